"""Policy optimization with what other programs do: a server that samples, and a judge that rates."""

import csv
import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from grpo_parts import prompts_file
from numerics import difference
from openai_server import Answer, Asked, said, serving
from safetensors.torch import load_file
from script_runs import run_script, without_charts
from two import command, run_two, values

import litmini
from litmini.config.grpo import GrpoConfig
from litmini.config.judge import JudgeConfig
from litmini.errors import UserError
from litmini.generation.rollouts import sample
from litmini.tasks.grpo_judge import PROMPT, JudgeReward, read_rating
from litmini.tasks.grpo_losses import policy_loss

REWARD = "def even(prompt, completion, record):\n    return len(completion) % 2\n"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    without_charts(monkeypatch)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("grpo_server")
    (place / "rewards.py").write_text(REWARD)
    return {"train": prompts_file(place / "train.jsonl"), "rewards": place / "rewards.py"}


def words(tiny_dir: Path, files: dict[str, Path], out_dir: Path, *more: object, steps: int = 3) -> list[str]:
    found = [
        "--checkpoint_dir",
        tiny_dir,
        "--out_dir",
        out_dir,
        "--data.path",
        files["train"],
        "--data.max_seq_len",
        80,
    ]
    found += ["--rewards.functions", f"[{files['rewards']}:even]", "--eval.samples", 0, "--precision", "32-true"]
    found += ["--optim.lr", "1e-3", "--train.global_batch_size", 12, "--train.micro_batch_size", 5]
    found += ["--train.max_steps", steps, "--grpo.num_generations", 4, "--grpo.max_completion_length", 6]
    return list(map(str, [*found, *more]))


def metrics(directory: Path) -> list[dict[str, str]]:
    with (directory / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@contextmanager
def sampling_server(tiny_dir: Path, shift: float = 0.0) -> Iterator[Asked]:
    """What vLLM does with these requests, with a model of ours; its log-probabilities are off by `shift`."""
    adapters: dict[str, Any] = {}
    lock = threading.Lock()

    def answer(body: Any, number: int) -> Answer:
        path = asked.requests[number][0].removeprefix("/v1")
        if path == "/models":
            return 200, {"data": [{"id": "base"}]}, {}
        with lock:
            if path == "/load_lora_adapter":
                if body["lora_name"] in adapters:
                    return 400, {"message": "already loaded"}, {}
                began = body["lora_name"].endswith("-step-0")  # with B = 0, which litmini takes for a mistake
                own = None if began else body["lora_path"]
                adapters[body["lora_name"]] = litmini.load(tiny_dir, own, dtype="fp32")[0]
                return 200, b"Success: LoRA adapter added successfully.", {}
            if path == "/unload_lora_adapter":
                return (
                    (200, b"Success", {}) if adapters.pop(body["lora_name"], None) else (404, {"message": "none"}, {})
                )
            model = adapters[body["model"]]
            (found,) = sample(model, [body["prompt"]], [body["seed"]], body["stop_token_ids"], body["temperature"],
                              body["max_tokens"], 1)  # fmt: skip
        logprobs = {"token_logprobs": [value + shift for value in found.log_probs]}
        finish = "length" if found.truncated else "stop"
        return 200, {"choices": [{"token_ids": found.ids, "logprobs": logprobs, "finish_reason": finish}]}, {}

    with serving(answer) as asked:
        yield asked


def test_a_server_samples_what_the_model_would(tiny_dir, files, tmp_path, capfd):
    """Each step's completions come from that step's adapters, in one process and in two."""
    val = ("--data.val_path", files["train"], "--train.eval_every", 2)
    run_script(capfd, "finetune_grpo", *words(tiny_dir, files, tmp_path / "here", *val))
    with sampling_server(tiny_dir) as asked:
        served = [*val, "--sampler.base_url", asked.url]
        run_script(capfd, "finetune_grpo", *words(tiny_dir, files, tmp_path / "served", *served))
        loaded = [body["lora_name"] for path, body, _ in asked.requests if path == "/v1/load_lora_adapter"]
        two = words(tiny_dir, files, tmp_path / "two", *served, "--devices", 2, "--strategy", "ddp")
        values(run_two(command, "finetune_grpo", *two))
    assert {name.rpartition("-")[2] for name in loaded} == {"0", "1", "2", "3"}  # 3: the last validation
    for name in ("served", "two"):
        for a, b in zip(metrics(tmp_path / "here"), metrics(tmp_path / name), strict=True):
            for column in ("loss", "reward", "val_reward", "entropy", "length", "ratio"):
                assert float(b.get(column) or 0) == pytest.approx(float(a.get(column) or 0), rel=1e-3, abs=1e-5), column
        one, other = (load_file(tmp_path / n / "final/adapter_model.safetensors") for n in ("here", name))
        assert max(difference(other[key], one[key]) for key in one) <= 1e-3


@pytest.mark.parametrize("loss_type", ["dapo", "rloo"])
def test_a_server_that_is_off_is_reported_and_corrected(tiny_dir, files, tmp_path, capfd, loss_type):
    """Where it gives log-probabilities 0.1 too small, tokens are too probable here: the loss is weighted, up to a bound."""
    losses = {}
    for most in (3.0, 1.02):
        with sampling_server(tiny_dir, -0.1) as asked:
            more = ["--sampler.base_url", asked.url, "--sampler.max_weight", most, "--grpo.loss_type", loss_type]
            more += ["--grpo.scale_rewards", "none"] * (loss_type != "rloo")
            run_script(capfd, "finetune_grpo", *words(tiny_dir, files, tmp_path / str(most), *more, steps=1))
        (row,) = metrics(tmp_path / str(most))
        assert float(row["ratio"]) == pytest.approx(math.exp(0.1), rel=1e-5)
        assert float(row["logp_difference"]) == pytest.approx(0.1, rel=1e-4)
        losses[most] = float(row["grad_norm"])
    if loss_type == "dapo":
        assert losses[3.0] / losses[1.02] == pytest.approx(math.exp(0.1) / 1.02, rel=1e-3)
    else:
        assert losses[3.0] > 1.2 * losses[1.02]  # the weight of six tokens together


def test_weights_of_completions():
    """Of each token, or for rloo of the completion."""
    logp, mask, advantage = torch.randn(2, 3), torch.tensor([[1, 1, 0], [1, 1, 1]]).bool(), torch.tensor([1.0, -2.0])
    weights = torch.tensor([[2.0, 3.0, 9.0], [0.5, 0.5, 0.5]])
    token = policy_loss(logp, logp, mask, advantage, GrpoConfig(loss_type="dapo"), weights=weights)
    assert float(token.loss) == pytest.approx(-1 * (2 + 3) + 2 * 1.5)
    same = torch.tensor([[2.0, 2.0, 9.0], [0.5, 0.5, 0.5]])
    whole = policy_loss(logp, logp, mask, advantage, GrpoConfig(loss_type="rloo"), weights=same)
    assert float(whole.loss) == pytest.approx(-1 * 2 + 2 * 0.5)


def test_what_a_server_may_lack(tiny_dir, files, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    plain = {"choices": [{"text": "hello", "logprobs": None, "finish_reason": "stop"}]}

    def tokens(ids: list[int]) -> Answer:
        choice = {"token_ids": ids, "logprobs": {"token_logprobs": [-1.0] * len(ids)}, "finish_reason": "stop"}
        return 200, {"choices": [choice]}, {}

    for answer, expected in (
        (lambda body, number: (404 if body else 200, {"detail": "Not Found"}, {}), "VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
        (lambda body, number: (200, plain, {}), "the reply has no token ids with their log-probabilities"),
        (lambda body, number: tokens([5, 9999]), "id 9999, but the model has the rows 0 to 511"),
        (lambda body, number: tokens([-1]), "id -1, but the model has the rows 0 to 511"),
        (lambda body, number: tokens([5] * 7), "a completion has 7 tokens; asked for 6 at most"),
        (lambda body, number: (404, {"detail": "Not Found"}, {}), "/v1 answers 404: Not Found. Does base_url end"),
        (lambda body, number: (200, b"<html>", {}), "is this the address of an OpenAI-compatible server"),
    ):
        with serving(answer) as asked:
            more = ["--sampler.base_url", asked.url]
            place = tmp_path / str(asked.url)[-8:-3]
            out = run_script(capfd, "finetune_grpo", *words(tiny_dir, files, place, *more), status=1)
        assert expected in out and "Traceback" not in out
        asked_for_models = asked.requests[0][0] == "/v1/models"
        assert asked_for_models and place.exists() == (len(asked.requests) > 1)  # nothing was made before it answered
    more = ["--sampler.base_url", "http://localhost:1/v1"]
    out = run_script(capfd, "finetune_grpo", *words(tiny_dir, files, tmp_path / "x", *more), status=1)
    assert "Connection refused. Does the server run, and is this its address?" in out and not (tmp_path / "x").exists()
    out = run_script(capfd, "finetune_grpo", *words(tiny_dir, files, tmp_path / "x", "--sampler.base_url", "http://localhost:1/v1",
                     "--lora", "null"), status=2)  # fmt: skip
    assert "sampler.base_url: the server gets adapters in each step" in out


# A judge


def test_ratings_in_replies():
    found = {
        text: read_rating(text)
        for text in ("[[7]]", "first [[2]], no:\n[[ 9.5 ]]", "8/10", " 3.", "[[11]]", "good", "7 of 9")
    }
    assert list(found.values()) == [7.0, 9.5, 8.0, 3.0, None, None, None]


def test_a_judge_rewards_completions(tiny_dir, files, tmp_path, capfd):
    """By the length of the answer; one that says nothing, and one that fails, leave their completions out."""

    def answer(body: Any, number: int) -> Answer:
        assert body["model"] == "judge" and body["temperature"] == 0
        text = body["messages"][0]["content"]
        given = text.split("[Answer]\n", 1)[1].split("\n[End of answer]")[0]
        if number % 12 == 3:
            return said("I cannot say.")
        if number % 12 == 5:
            return 400, {"error": {"message": "no"}}, {}
        return said(f"It has length {len(given)}. [[{len(given) % 11}]]")

    with serving(answer) as asked:
        more = ["--rewards.functions", "[judge]", "--judge.base_url", asked.url, "--judge.model", "judge"]
        out = run_script(capfd, "finetune_grpo", *words(tiny_dir, files, tmp_path / "run", *more))
    assert len(asked.requests) == 36 and "judge has no rating" in out
    rows = metrics(tmp_path / "run")
    assert all(float(row["failed"]) == pytest.approx(2 / 12) and 0 < float(row["reward"]) <= 1 for row in rows)
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert samples and all(row["reward"] == pytest.approx(len(row["prediction"]) % 11 / 10) for row in samples)


def test_a_judge_and_its_address_go_together(tiny_dir, files, tmp_path, capfd):
    for more in (["--rewards.functions", "[judge]"], ["--judge.base_url", "http://localhost:1/v1"]):
        out = run_script(capfd, "finetune_grpo", *words(tiny_dir, files, tmp_path / "run", *more), status=2)
        assert "go together" in out


def test_a_judge_sees_what_is_asked_and_answered(tmp_path):
    """What stands in a completion is not read as a placeholder; an own prompt lacks none."""
    messages: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why {answer}?"}]
    with serving(lambda body, number: said("[[5]]")) as asked:
        judge = JudgeReward(JudgeConfig(base_url=asked.url, model="m"))
        assert judge.score([(messages, "{question}"), ("Hi", "ho")]) == [0.5, 0.5]
        texts = sorted((body["messages"][0]["content"] for _, body, _ in asked.requests), key=len)
        assert texts[0] == PROMPT.replace("{question}", "Hi").replace("{answer}", "ho")
        assert "system: Be brief.\n\nuser: Why {answer}?" in texts[1] and "[Answer]\n{question}\n" in texts[1]
        body = {"max_tokens": None, "max_completion_tokens": 9}
        judge = JudgeReward(JudgeConfig(base_url=asked.url, model="m", body=body))
        assert judge.score([("Hi", "ho")]) == [0.5]
        assert asked.requests[-1][1].keys() == {"model", "messages", "temperature", "max_completion_tokens"}
        with pytest.raises(UserError, match="judge.body has the entry messages"):
            JudgeConfig(base_url=asked.url, body={"messages": []})
        file = tmp_path / "prompt.txt"
        file.write_bytes(b"\xff{question}{answer}")
        with pytest.raises(UserError, match="is not UTF-8 text"):
            JudgeReward(JudgeConfig(base_url=asked.url, model="m", prompt=str(file)))
        file.write_text("Rate {answer}")
        with pytest.raises(UserError, match=r"lacks \{question\}"):
            JudgeReward(JudgeConfig(base_url=asked.url, model="m", prompt=str(file)))


def test_a_run_keeps_adapters_of_one_step_only(tiny_dir, files, tmp_path, capfd):
    with sampling_server(tiny_dir) as asked:
        more = ["--sampler.base_url", asked.url]
        run_script(capfd, "finetune_grpo", *words(tiny_dir, files, tmp_path / "run", *more))
    (left,) = (tmp_path / "run/sampler").iterdir()
    assert left.name.endswith("-step-2")
