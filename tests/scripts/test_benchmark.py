"""The benchmark: the work that all tools get, its command line, and what it makes of results."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from pairs import plan_pairs, write_pairs
from report import make_rows, table
from work import plan_work, write_samples

from litmini.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]


def test_samples_are_the_same_each_time_and_of_all_lengths(tmp_path, tiny_dir):
    for name in ("one", "two"):
        write_samples(tmp_path / name, 200, max_tokens=200)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    texts = [json.loads(line)["text"].split() for line in (tmp_path / "one").open()]
    assert len(set(map(len, texts))) > 15 and len(texts) == 200


def test_every_sample_of_a_step_is_what_the_file_says(tmp_path, tiny_dir):
    write_samples(tmp_path / "data.jsonl", 40, max_tokens=60)
    tokenizer = Tokenizer(tiny_dir)
    work = plan_work(str(tiny_dir), tmp_path / "data.jsonl", "lora", 3, 2, 128, torch.float32)
    texts = [json.loads(line)["text"] for line in (tmp_path / "data.jsonl").open()]
    known = {tuple([*tokenizer.encode(text), tokenizer.stop_ids[0]])[:129] for text in texts}
    chosen = [tuple(sample) for step in work.steps for sample in step]
    assert set(chosen) <= known and len(set(chosen)) == len(chosen)
    assert not set(map(tuple, work.validation)) & set(chosen)
    assert all(sum(len(sample) - 1 for sample in step) <= 2 * 128 for step in work.steps)
    assert len(work.flops) == 3 and min(work.flops) > 0


def test_the_command_compares_the_same_work(tmp_path, tiny_dir, monkeypatch, capsys):
    """Processes of their own; transformers has the same loss, and a tool that is not there is a note."""
    words = ["--model", tiny_dir, "--tasks", "[lora]", "--dtypes", "[fp32]", "--steps", 6, "--rounds", 1]
    words += ["--tools", "[litmini, transformers, litgpt]", "--max_seq_len", 64, "--out_dir", tmp_path / "out"]
    words += ["--pythons", "{litgpt: /bin/false}", "--json", tmp_path / "rows.json"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts/benchmark.py"), run_name="__main__")
    said = capsys.readouterr()
    assert ended.value.code == 0 and "note: litgpt is not installed" in said.err, said.err
    rows = {row["tool"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert rows.keys() == {"litmini", "transformers"}
    for row in rows.values():
        assert row["real_tokens_per_second"] > 0 and row["peak_memory_mib"] > 100 and 0 < row["mfu"] < 1
        assert 0.5 < row["seconds_to_first_step"] < 100 and row["versions"]["torch"] and row["same_losses"]
    one, other = rows.values()
    for name in ("loss_start", "loss_end", "validation_loss", "validation_loss_bf16"):
        assert one[name] == pytest.approx(other[name], abs=0.01)  # adapters start at random
    assert "| lora | litmini | fp32 |" in said.out and (tmp_path / "out/chart.png").stat().st_size > 5_000


def result(
    tmp_path: Path,
    tool: str,
    seconds: float,
    loss: float,
    validation: float = 2.0,
    dtype: str = "bf16",
    rate: float = 1e10,
) -> dict:
    (tmp_path / "work.json").write_text(json.dumps({"steps": [[[0] * 11]] * 4, "flops": [1e9] * 4}))
    job = {"task": "lora", "tool": tool, "variant": "", "dtype": dtype, "work": str(tmp_path / "work.json")}
    return {
        "job": job,
        "seconds": [9.0, seconds, seconds, seconds],
        "losses": [loss] * 4,
        "seconds_to_first_step": 1.0,
        "peak_memory_mib": 100.0,
        "validation_loss": validation,
        "product_rate": rate,
        "versions": {},
        "hardware": {"cpu": "a", "device": "cpu", "threads": 1},
    }


def test_rows_are_medians_without_the_warm_up_and_other_work_is_marked(tmp_path):
    found = [result(tmp_path, "litmini", seconds, 3.0) for seconds in (0.5, 0.1, 0.2)]
    found += [result(tmp_path, "trl", 1.0, 3.01), result(tmp_path, "litgpt", 1.0, 3.2)]
    rows = {row["tool"]: row for row in make_rows(found, 1)}
    assert rows["litmini"]["real_tokens_per_second"] == pytest.approx(50)
    assert rows["litmini"]["mfu"] == pytest.approx(1e9 / 0.2 / 1e10)
    assert [rows[tool]["same_losses"] for tool in ("litmini", "trl", "litgpt")] == [True, True, False]
    assert "litgpt (other losses)" in table(list(rows.values()))


def test_a_tool_is_not_its_own_witness(tmp_path):
    """Its variants have its losses, whatever work it does."""
    found = [result(tmp_path, tool, 1.0, loss) for tool, loss in (("litmini", 3.0), ("litmini", 3.0), ("trl", 3.2))]
    found[1]["job"]["variant"] = "compiled"
    assert [row["same_losses"] for row in make_rows(found, 1)] == [False] * 3


def test_compiled_runs_are_measured_beside_the_others(tmp_path, tiny_dir):
    benchmark = runpy.run_path(str(ROOT / "scripts/benchmark.py"))
    config = benchmark["BenchmarkConfig"](checkpoint_dir=str(tiny_dir), steps=2, warmup_steps=1, max_seq_len=64)
    jobs = benchmark["training_jobs"](config, tmp_path, "lora", "bf16", ["litmini", "trl"])
    assert [(job["tool"], job["variant"]) for job in jobs] == [("litmini", ""), ("litmini", "compiled"), ("trl", "")]
    assert jobs[1]["words"] == [*jobs[0]["words"], "--compile", "true"]
    at = jobs[0]["words"].index("--compile")
    assert jobs[0]["words"][at + 1] == "false"  # auto, the default on GPUs, may compile


def test_mfu_is_relative_to_the_median_rate_of_matmuls(tmp_path):
    """On a machine whose speed changes, a tool is not better for a slow moment before its run."""
    rates = {"litmini": 1e10, "trl": 4e10, "litgpt": 2e10}
    rows = make_rows([result(tmp_path, tool, 0.2, 3.0, rate=rate) for tool, rate in rates.items()], 1)
    assert [row["mfu"] for row in rows] == [pytest.approx(1e9 / 0.2 / 2e10)] * 3


@pytest.mark.parametrize(
    ("losses", "same"),
    [
        ([("a", "bf16", 3.0), ("b", "bf16", 3.07)], [False, False]),
        ([("a", "bf16", 3.0), ("b", "bf16", 3.03)], [True, True]),
        ([("a", "bf16", 3.0)], [True]),
        (
            [("a", "bf16", 2.6), ("b", "bf16", 3.0), ("c", "bf16", 3.0), ("a", "fp32", 2.6), ("b", "fp32", 2.6)],
            [1, 0, 0, 1, 1],
        ),
        ([("a", "bf16", 2.6), ("b", "bf16", 2.6), ("a", "fp32", 3.0)], [False, False, True]),
    ],
)
def test_losses_are_compared_in_fp32_where_it_was_run(tmp_path, losses, same):
    rows = make_rows([result(tmp_path, tool, 0.2, loss, dtype=dtype) for tool, dtype, loss in losses], 1)
    assert [row["same_losses"] for row in rows] == [bool(one) for one in same]


def test_every_pair_of_a_step_is_what_the_file_says(tmp_path, tiny_dir):
    write_pairs(tmp_path / "pairs.jsonl", 30, max_tokens=60)
    tokenizer, rows = Tokenizer(tiny_dir), [json.loads(line) for line in (tmp_path / "pairs.jsonl").open()]
    work = plan_pairs(str(tiny_dir), tmp_path / "pairs.jsonl", 3, 2, 128, torch.float32)
    known = {
        (*tokenizer.encode_prompt(row["prompt"]), *tokenizer.encode(row[name], special=False), tokenizer.stop_ids[0])[
            :129
        ]
        for row in rows
        for name in ("chosen", "rejected")
    }
    chosen = [tuple(sample) for step in work.steps for sample in step]
    assert set(chosen) <= known and len(chosen) % 2 == 0 and len(work.flops) == 3
    prompts = [prompt for step in work.prompts for prompt in step]
    assert all(a[:size] == b[:size] for a, b, size in zip(chosen[::2], chosen[1::2], prompts[::2], strict=True))


def test_pairs_per_second_are_in_the_table(tmp_path):
    found = result(tmp_path, "litmini", 0.2, 3.0)
    (tmp_path / "work.json").write_text(
        json.dumps({"steps": [[[0] * 11] * 4] * 4, "flops": [1e9] * 4, "prompts": [[1]]})
    )
    (row,) = make_rows([found], 1)
    assert row["pairs_per_second"] == pytest.approx(2 / 0.2) and "(10.00 pairs/s)" in table([row])
