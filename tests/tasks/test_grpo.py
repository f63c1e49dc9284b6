"""Policy optimization: prompts, rewards, and whole runs of the script on a tiny model."""

import csv
import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from grpo_data import records
from grpo_parts import prompts_file
from numerics import difference
from safetensors.torch import load_file
from script_runs import run_script, without_charts
from two import command, run_two, values

from litmini.checkpoints.hf import load_model
from litmini.config.grpo import FinetuneGrpoConfig, GrpoConfig, GrpoDataConfig, RewardsConfig
from litmini.config.training import TrainConfig
from litmini.data.prompts import Prompt, completion_batch, load_prompts
from litmini.errors import UserError
from litmini.generation.rollouts import sample
from litmini.methods.heads import use_log_probs
from litmini.ops.cross_entropy import IGNORE
from litmini.runs.run import read_samples
from litmini.tasks import grpo_rewards
from litmini.tasks.grpo_completions import Completion, learning_batches
from litmini.tasks.grpo_rewards import load_rewards
from litmini.tasks.grpo_sampling import Sampling
from litmini.tokenizer import Tokenizer
from litmini.training.setup import Feed

ROOT = Path(__file__).parents[2]
REWARDS = '''
import time

calls = 0

def even(prompt, completion, record):
    """Half of all texts."""
    return len(completion) % 2

def picky(prompt, completion, record):
    global calls
    calls += 1
    print("call", calls)
    if calls % 3 == 1:
        return 1 / 0
    return float("nan") if calls % 7 == 2 else calls % 2

def text(prompt, completion, record):
    return "good"

def endless(prompt, completion, record):
    while True:
        try:
            time.sleep(0.01)
        except Exception:
            pass

def same(prompt, completion, record):
    return 0.25

def completions(prompt, completion, record):
    return float(record["answer"])

def two(prompt, completion):
    return 0
'''


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("grpo")
    (place / "rewards.py").write_text(REWARDS)
    found = {"train": prompts_file(place / "train.jsonl"), "val": prompts_file(place / "val.jsonl", 5, 40)}
    return {**found, "rewards": place / "rewards.py"}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    without_charts(monkeypatch)


def run(capfd: Any, *arguments: object, status: int = 0) -> str:
    return run_script(capfd, "finetune_grpo", *arguments, status=status)


def words(
    tiny_dir: Path, files: dict[str, Path], out_dir: Path, *more: object, rewards: str = "even", steps: int = 4
) -> list[str]:
    names = [f"{files['rewards']}:{name}" if not hasattr(grpo_rewards, name) else name for name in rewards.split()]
    fixed = ["--checkpoint_dir", tiny_dir, "--out_dir", out_dir, "--data.path", files["train"]]
    fixed += ["--data.val_path", files["val"], "--rewards.functions", f"[{', '.join(names)}]", "--eval.samples", 1]
    fixed += ["--data.max_seq_len", 80, "--precision", "32-true", "--optim.lr", "1e-3", "--eval.max_new_tokens", 4]
    fixed += ["--train.global_batch_size", 12, "--train.micro_batch_size", 5, "--train.max_steps", steps]
    fixed += ["--grpo.num_generations", 4, "--grpo.max_completion_length", 6]
    return list(map(str, [*fixed, *more]))


def metrics(directory: Path) -> list[dict[str, str]]:
    with (directory / "metrics.csv").open() as file:
        moody = ("tokens_per_second", "mfu", "memory_mib")
        return [{k: v for k, v in row.items() if k not in moody} for row in csv.DictReader(file)]


# Whole runs


def test_a_run_reports_what_it_samples(tiny_dir, files, tmp_path, capfd, monkeypatch):
    feeds: list[Any] = []
    monkeypatch.setattr("litmini.training.loop.Feed", lambda *given: feeds.append(given) or Feed(*given))
    out = run(capfd, *words(tiny_dir, files, tmp_path / "run", "--grpo.temperature", 0.8, rewards="even length"))
    assert "validation reward" in out and "4 steps of 3 prompts with 4 completions each: 1.00 epochs" in out
    rows = metrics(tmp_path / "run")
    for row in rows:
        assert float(row["ratio"]) == pytest.approx(1, abs=1e-6), "sampler and trainer agree"
        assert float(row["logp_difference"]) < 1e-5 and float(row["clipped"]) == 0
        assert float(row["reward"]) == pytest.approx(float(row["reward_even"]) + float(row["reward_length"]), abs=1e-5)
        assert 0 < float(row["length"]) <= 6 and 0 <= float(row["truncated"]) <= 1 and float(row["failed"]) == 0
        assert 0 < float(row["reward_std"]) < 1 and float(row["entropy"]) > 1 and 0 <= float(row["equal_groups"]) <= 1
    assert feeds[0][-1] is False, "no completion comes from weights of an earlier step, on a GPU either"
    samples = read_samples(tmp_path / "run")
    assert [row["step"] for row in samples] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert all(a["reward"] >= b["reward"] for a, b in zip(samples[::2], samples[1::2], strict=True))
    report = (tmp_path / "run/report.html").read_text()
    assert "completions in step 1" in report and "best, reward" in report
    assert (tmp_path / "run/reward.png").stat().st_size > 0
    results = json.loads((tmp_path / "run/manifest.json").read_text())
    assert {"reward_before", "reward_after"} <= results["results"].keys()
    assert str(files["rewards"]) in results["data"], "a run is not resumed with another reward"


@pytest.mark.parametrize("more", [(), ("--grpo.loss_type", "rloo"), ("--grpo.loss_type", "gspo")])
def test_rewards_rise(tiny_dir, files, tmp_path, capfd, more):
    """A reward that is easily found: vowels."""
    reward = tmp_path / "rewards.py"
    reward.write_text("def vowels(prompt, completion, record):\n    return sum(c in 'aeiou' for c in completion) / 6\n")
    more = ["--lora", "null", "--optim.lr", 5e-3, "--train.global_batch_size", 32, "--grpo.num_generations", 16, *more]
    run(capfd, *words(tiny_dir, {**files, "rewards": reward}, tmp_path / "run", *more, rewards="vowels", steps=20))
    rows = [float(row["reward"]) for row in metrics(tmp_path / "run")]
    assert sum(rows[-5:]) > 1.5 * sum(rows[:5]), rows


EVERYTHING = ("--grpo.epsilon", 1e-3, "--grpo.num_iterations", 2, "--grpo.beta", 0.1, "--train.eval_every", 3)


def test_a_prompt_gets_other_completions_in_another_step(tiny_dir, files, tmp_path, capfd):
    """Also where nothing is learned in between."""
    data = prompts_file(tmp_path / "one.jsonl", 1)
    more = ["--data.path", data, "--optim.lr", 0, "--train.global_batch_size", 4]
    run(capfd, *words(tiny_dir, files, tmp_path / "run", *more, steps=2))
    found = [
        {row["prediction"] for row in read_samples(tmp_path / "run") if row["step"] == step and "advantage" in row}
        for step in (1, 2)
    ]
    assert found[0] and found[1] and found[0].isdisjoint(found[1])


def test_the_divergence_of_rloo_is_in_the_rewards(tiny_dir, files, tmp_path, capfd, monkeypatch):
    """beta (l_old - l_ref), summed over a completion, where l_ref is that of the base alone."""
    seen: list[list[Completion]] = []
    compare = Sampling._compare
    monkeypatch.setattr(Sampling, "_compare", lambda *given: seen.append(given[1]) or compare(*given))
    more = ("--grpo.loss_type", "rloo", "--grpo.beta", 0.5, "--optim.lr", 1e-2)
    run(capfd, *words(tiny_dir, files, tmp_path / "run", *more, steps=2))
    base, differences = load_model(tiny_dir, torch.float32), []
    for completion in seen[1]:
        tokens = torch.tensor([completion.prompt_ids + completion.ids])
        with torch.no_grad():
            log_probs = base(tokens[:, :-1]).log_softmax(-1)[0, len(completion.prompt_ids) - 1 :]
        reference = log_probs.gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
        assert completion.reference == pytest.approx(reference.tolist(), abs=1e-4)
        differences.append(sum(completion.old) - float(reference.sum()))
        assert completion.reward == pytest.approx(completion.rewards[0] - 0.5 * differences[-1], abs=1e-3)
    assert max(map(abs, differences)) > 0.05


def test_two_processes_equal_one(tiny_dir, files, tmp_path, capfd):
    """Three groups for two processes; also where each holds a shard of the model."""
    run(capfd, *words(tiny_dir, files, tmp_path / "one", *EVERYTHING))
    for name in ("ddp", "fsdp"):
        two = words(tiny_dir, files, tmp_path / name, *EVERYTHING, "--devices", 2, "--strategy", name)
        values(run_two(command, "finetune_grpo", *two))
        for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / name), strict=True):
            for column in a:
                assert (a[column] == "") == (b[column] == ""), column
                assert float(b[column] or 0) == pytest.approx(float(a[column] or 0), rel=1e-3, abs=1e-5), column
        ours, theirs = (load_file(tmp_path / which / "final/adapter_model.safetensors") for which in ("one", name))
        assert max(difference(theirs[key], ours[key]) for key in ours) <= 1e-3
        assert read_samples(tmp_path / "one") == read_samples(tmp_path / name)


def test_resumed_equals_undisturbed(tiny_dir, files, tmp_path, capfd):
    """In the middle of the steps on the same completions, which the checkpoint has."""
    more = [*EVERYTHING, "--train.save_every", 1, "--train.keep_last", 9]
    run(capfd, *words(tiny_dir, files, tmp_path / "whole", *more))
    assert not (tmp_path / "whole/final/rollouts.json").exists()
    rows = metrics(tmp_path / "whole")
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert float(first["clipped"]) == 0 and float(first["ratio"]) == pytest.approx(1, abs=1e-6) and first["reward"]
        assert float(second["clipped"]) > 0 and float(second["logp_difference"]) > 1e-4 and not second["reward"]
    assert float(rows[0]["kl"]) == 0 and float(rows[-1]["kl"]) > 0
    assert [(tmp_path / f"whole/step-00000{i}/rollouts.json").exists() for i in (1, 2, 3, 4)] == [True, False] * 2
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for name in ("final", "step-000004", "step-000002"):
        shutil.rmtree(tmp_path / "run" / name)
    run(capfd, *words(tiny_dir, files, tmp_path / "run", *more, "--resume", "auto"))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert read_samples(tmp_path / "run") == read_samples(tmp_path / "whole")
    one, other = (load_file(tmp_path / name / "final/adapter_model.safetensors") for name in ("run", "whole"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_full_finetuning_and_a_preview(tiny_dir, files, tmp_path, capfd):
    run(capfd, *words(tiny_dir, files, tmp_path / "full", "--lora", "null", steps=1))
    assert (tmp_path / "full/final/model.safetensors").is_file()
    out = run(capfd, *words(tiny_dir, files, tmp_path / "x", "--dry_run", "--show_masks", 1))
    assert "--- prompt 1: " in out and "peak memory of the process" in out and "cannot be est" not in out
    assert not (tmp_path / "x").exists()


# Bad rewards


def test_equal_rewards_are_said_and_dropped(tiny_dir, files, tmp_path, capfd):
    out = run(capfd, *words(tiny_dir, files, tmp_path / "x", "--grpo.dynamic_sampling", "true", rewards="same"))
    assert out.count("have equal rewards (mean 0.25): there is nothing to learn from") == 1
    assert "in 4 of 4 steps the completions to each prompt had equal rewards" in out
    assert all(row["equal_groups"] == "1.0" and row["loss"] == "0.0" for row in metrics(tmp_path / "x"))
    tensors = load_file(tmp_path / "x/final/adapter_model.safetensors")
    assert all((tensor == 0).all() for name, tensor in tensors.items() if "lora_B" in name), "nothing was learned"


def test_failures_are_left_out_counted_and_shown(tiny_dir, files, tmp_path, capfd):
    out = run(capfd, *words(tiny_dir, files, tmp_path / "x", rewards="picky"))
    assert "warning: a reward failed, and its completion is left out (the first time): picky" in out
    assert "warning: reward picky failed for" in out and "ZeroDivisionError: division by zero (rewards.py:15)" in out
    assert all(0.2 < float(row["failed"]) <= 0.8 for row in metrics(tmp_path / "x"))
    assert (tmp_path / "x/rewards.log").read_text().startswith("call 1\ncall 2\n") and "call 1" not in out


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        ("text", "no completion of this step has a reward: text returned 'good', expected a number or None, for"),
        ("endless", "no completion of this step has a reward: endless took more than 0.01 s (rewards.time_limit), for"),
        (
            "missing",
            "rewards.py has no function 'missing'; there are even, picky, text, endless, same, completions, two.",
        ),
        ("two", "rewards.py:two does not take prompt, completion and record"),
    ],
)
def test_bad_functions(tiny_dir, files, tmp_path, capfd, reward, expected):
    given = words(tiny_dir, files, tmp_path / "x", "--rewards.time_limit", 0.01, "--grpo.max_completion_length", 2)
    given[given.index("--rewards.functions") + 1] = f"[{files['rewards']}:{reward}]"
    error = run(capfd, *given, "--data.val_path", "null", status=1)
    assert expected in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("functions", "expected"),
    [
        ("[nothing.py:f]", "nothing.py"),
        ("[exact_mach]", "'exact_mach' is not there; expected FILE.py:FUNCTION, the directory of a reward model, or one of"),
        ("[json_schema, length]", ""),
    ],
)  # fmt: skip
def test_rewards_that_are_not_there(tmp_path, functions, expected):
    names = functions.strip("[]").split(", ")
    if expected:
        with pytest.raises(UserError, match="^[^\n]*$") as raised:
            load_rewards(RewardsConfig(names))
        assert expected in str(raised.value)
    else:
        assert load_rewards(RewardsConfig(names))[0].names == ("json_schema", "length")


@pytest.mark.parametrize("code", ["def f(:\n", "import nothing_of_this_name\n", "1 / 0\n", "raise SystemExit\n"])
def test_a_reward_file_that_cannot_be_imported_is_named(tmp_path, code):
    (tmp_path / "bad.py").write_text(code)
    with pytest.raises(UserError, match="bad.py:1: "):
        load_rewards(RewardsConfig([f"{tmp_path / 'bad.py'}:f"]))


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--train.global_batch_size", "6"], "expected a multiple of grpo.num_generations 4"),
        (["--grpo.num_iterations", "3"], "train.max_steps 4: expected a multiple of grpo.num_iterations 3"),
        (["--lora", "null", "--grpo.beta", "0.1"], "grpo.beta compares with the model at the start"),
        (["--grpo.num_generations", "1"], "out of range: grpo.num_generations is 1"),
        (["--rewards.functions", "[]"], "out of range: rewards.functions is []"),
        (["--rewards.weights", "[1, 2]"], "out of range: rewards.weights is [1"),
        (["--rewards.pattern", "("], "rewards.pattern '(' is no regular expression"),
        (["--rewards.functions", "[regex]"], "needs --rewards.pattern"),
        (["--grpo.temperature", "0"], "grpo.temperature is 0"),
    ],
)
def test_settings_that_are_refused(tiny_dir, files, tmp_path, capfd, more, expected):
    assert expected in run(capfd, *words(tiny_dir, files, tmp_path / "x", *more), status=2)


# Rewards


def reward(name: str, text: str, **columns: Any) -> float | None:
    settings = {key: columns.pop(key) for key in ("pattern", "schema_file", "length") if key in columns}
    settings = {"schema" if key == "schema_file" else key: value for key, value in settings.items()}
    rewards, _ = load_rewards(RewardsConfig([name], **settings))
    ((found,),) = rewards.score([(Prompt("a.jsonl:1", "q", columns), text)])
    return found


@pytest.mark.parametrize(
    ("name", "text", "columns", "expected"),
    [
        ("exact_match", " Paris\n", {"answer": "Paris"}, 1), ("exact_match", "Paris.", {"answer": "Paris"}, 0),
        ("number_match", "It is 1,200.", {"answer": "1200"}, 1), ("number_match", "3 and 4", {"answer": "#### 3"}, 0),
        ("number_match", "so 0.5", {"answer": "1/2"}, 1), ("number_match", "none", {"answer": 7}, 0),
        ("number_match", "-3", {"answer": -3}, 1), ("number_match", "1/0", {"answer": 1}, 0),
        ("regex", "a yes", {"pattern": "^a (yes|no)$"}, 1), ("regex", "yes a", {"pattern": "^a (yes|no)$"}, 0),
        ("length", "a b c", {"length": 3}, 1), ("length", "a b c", {"length": 2}, 0.5), ("length", "a b c", {"length": 1}, 0),
        ("json_schema", '{"a": 1}', {"schema": {"type": "object", "required": ["a"]}}, 1),
        ("json_schema", '{"b": 1}', {"schema": '{"type": "object", "required": ["a"]}'}, 0),
        ("json_schema", "{", {"schema": {}}, 0),
    ],
)  # fmt: skip
def test_built_in_rewards(name, text, columns, expected):
    assert reward(name, text, **columns) == expected


def test_a_missing_column_is_a_failure_that_says_so():
    rewards, _ = load_rewards(RewardsConfig(["exact_match"]))
    ((found,),) = rewards.score([(Prompt("a.jsonl:1", "q", {}), "x")])
    assert (
        found != found and "the record has no column 'answer'; --rewards.answer" in rewards.failures["exact_match"][1]
    )


def test_weights_and_rewards_that_do_not_apply():
    rewards, _ = load_rewards(RewardsConfig(["exact_match", "length"], weights=[2.0, -1.0]))
    assert rewards.total([1.0, 0.5]) == 1.5 and rewards.total([None, 0.5]) == -0.5
    assert rewards.total([None, None]) != 0 and rewards.total([float("nan"), 1.0]) != rewards.total([0.0, 1.0])


SCHEMA = {
    "type": "object", "required": ["item"], "additionalProperties": False,
    "properties": {
        "item": {"type": "string", "minLength": 1, "pattern": "^m"}, "n": {"type": "integer", "minimum": 1, "maximum": 9},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
        "x": {"anyOf": [{"type": "null"}, {"const": 2}]},
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"item": "mug"}, True), ({"item": "rug"}, False), ({}, False), ([], False), ({"item": "mug", "n": True}, False),
        ({"item": "mug", "n": 1.0}, True), ({"item": "mug", "n": 10}, False), ({"item": "mug", "other": 1}, False),
        ({"item": "mug", "tags": ["a", "b"]}, True), ({"item": "mug", "tags": ["c"]}, False), ({"item": ""}, False),
        ({"item": "mug", "tags": ["a"] * 3}, False), ({"item": "mug", "x": None}, True), ({"item": "mug", "x": 3}, False),
    ],
)  # fmt: skip
def test_json_schemas(tmp_path, value, expected):
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    assert reward("json_schema", json.dumps(value), schema_file=str(file)) == expected


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (3, "is 3, expected a JSON schema"),
        ({"type": "text"}, "is no JSON schema: 'text'"),
        ({"required": 1}, "1 is not of type"),
    ],
)
def test_what_is_no_schema_is_refused(tmp_path, schema, message):
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(schema))
    with pytest.raises(UserError, match=f"schema.json.*{re.escape(message)}"):
        reward("json_schema", "1", schema_file=str(file))


def test_schemas_fetch_nothing(monkeypatch):
    """A reference to elsewhere is a failure of the reward; without jsonschema, an error says what to install."""
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("it was fetched"))
    found = reward("json_schema", "1", schema={"$ref": "http://127.0.0.1:9/a.json"})
    assert found is not None and math.isnan(found)
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    rewards, _ = load_rewards(RewardsConfig(["json_schema"]))
    rewards.score([(Prompt("a.jsonl:1", "q", {"schema": {}}), "1")])
    assert "needs jsonschema: pip install" in rewards.failures["json_schema"][1]


# Prompts and completions


def test_prompts_of_every_form(tiny_dir, tmp_path):
    turns = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Two."}]
    rows: list[Any] = [
        {"prompt": "How many?", "answer": "Two."}, {"prompt": turns[:1], "answer": "Two."}, {"messages": turns},
        {"prompt": "How many?", "completion": "Two."},
    ]  # fmt: skip
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = Tokenizer(tiny_dir)
    train, _ = load_prompts(GrpoDataConfig(str(file), max_seq_len=64), tokenizer, 4, 0)
    assert {tuple(prompt.ids) for prompt in train.prompts} == {tuple(tokenizer.encode_prompt("How many?"))}
    assert [prompt.record["answer"] for prompt in train.prompts] == ["Two."] * 4
    assert sorted(train.prompt(i).where for i in range(4)) == sorted(train.prompt(i).where for i in range(4, 8))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "a"}, "1: found text; expected prompt"), ({"prompt": ""}, "1: prompt is empty"),
        ({"prompt": 3}, "1: expected a list of turns"), ({"messages": [{"role": "assistant", "content": "a"}]}, "turn alone"),
        ({"prompt": "long " * 90}, "1 of 1 prompt (the first: {file}:1) leave no room for a completion of 4 tokens within"),
    ],
)  # fmt: skip
def test_bad_prompts_are_named(tiny_dir, tmp_path, row, expected):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError) as raised:
        load_prompts(GrpoDataConfig(str(file), max_seq_len=64), Tokenizer(tiny_dir), 4, 0)
    assert expected.format(file=file) in str(raised.value)


def test_log_probabilities_of_sampling_are_those_of_the_trainer(tiny_dir):
    """Each token's, the end token's among them, at a temperature, whatever is sampled beside it."""
    model, temperature = load_model(tiny_dir, torch.float32).eval(), 0.7
    prompts = [list(range(5, 5 + size)) for size in (3, 9, 5, 9)]
    stops = list(range(3, 60))
    found = sample(model, prompts, [1, 2, 3, 4], stops, temperature, 12, 3)
    alone = [sample(model, [p], [i], stops, temperature, 12, 1)[0] for i, p in enumerate(prompts, 1)]
    assert [one.ids for one in found] == [one.ids for one in alone]
    ended = [one.ids[-1] in stops for one in found]
    assert [one.truncated for one in found] == [not end for end in ended] and any(ended)
    use_log_probs(model, temperature=temperature)
    batch = completion_batch([(p + one.ids, len(p)) for p, one in zip(prompts, found, strict=True)])
    with torch.no_grad():
        values_, count = model(**{k: batch[k] for k in ("tokens", "positions", "documents", "labels")})
    ours = [v for one in found for v in one.log_probs]
    assert int(count) == len(ours) and torch.tensor(ours).sub(values_[batch["labels"] != IGNORE]).abs().max() < 1e-5


def test_what_is_left_out_is_in_no_batch(tiny_dir, files):
    """Truncated completions have no labels but count as completions; one process has as many micro-batches as another."""
    config = FinetuneGrpoConfig(
        checkpoint_dir="x", out_dir="y", data=GrpoDataConfig("z"), rewards=RewardsConfig(["length"]),
        grpo=GrpoConfig(num_generations=2, mask_truncated=True),
        train=TrainConfig(global_batch_size=8, micro_batch_size=2),
    )  # fmt: skip
    rows = [
        Completion(i, "a:1", [3, 4], [5] * (i + 1), [-1.0] * (i + 1), i == 1, "", [1.0], 1.0, 0.5) for i in range(3)
    ]
    batches = [batch for _, batch in learning_batches(rows, config, 2)]
    assert [batch["completions"].tolist() for batch in batches] == [[1, 1], [1]] and len(batches) == 2
    assert [(batch["labels"] != IGNORE).sum(1).tolist() for batch in batches] == [[1, 0], [3]]
    assert batches[1]["sampled"].tolist() == [[0.0, -1.0, -1.0, -1.0]] and batches[1]["labels"].tolist() == [
        [-100, 5, 5, 5]
    ]
    assert [batch["completions"].tolist() for _, batch in learning_batches([], config, 2)] == [[0], [0]]


def test_the_quickstarts_prompts_are_what_their_script_writes():
    train, held_out = records()
    for name, rows in (("train", train), ("heldout", held_out)):
        assert [json.loads(line) for line in (ROOT / f"config_hub/grpo/{name}.jsonl").open()] == rows
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out} and len(held_out) >= 29
    rewards, _ = load_rewards(RewardsConfig([str(ROOT / "config_hub/grpo/rewards.py:right_and_short")]))
    texts = {"No": 1.0, "No.": 1.0, "No, it is in Peru.": 1 / 5, "Yes": 0.0, "": 0.0, "Not so": 0.0}
    for text, expected in texts.items():
        assert rewards.score([(Prompt("a:1", "q", {"answer": "no"}), text)]) == [[expected]]
