"""Judges: known verdicts by a local server and by a reward model, what they come to, and endpoints that fail."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import openai
import pytest
from openai_server import Asked, said, serving
from script_runs import ROOT, run_script

from litmini import openai_client
from litmini.data.preference_records import read_preferences
from litmini.errors import UserError
from litmini.evaluation import judge as judges
from litmini.evaluation.answers import Pair, read_human, read_pairs
from litmini.evaluation.judge import question, read_template, read_verdict
from litmini.evaluation.verdicts import Verdict, VerdictFile, summarize, winners

GOOD = {0, 1, 2, 5}
"""Pairs in which the answer of a is good; that of b is in 3 and 4, and both are in 6 and 7."""


def answers(directory: Path, count: int = 8) -> tuple[Path, Path]:
    files = directory / "a.jsonl", directory / "b.jsonl"
    for name, file in zip("ab", files, strict=True):
        rows = []
        for i in range(count):
            is_good = i >= 6 or (i in GOOD) == (name == "a")
            rows.append(
                {"line": i + 1, "prompt": f"question {i}?", "answer": f"{'good' if is_good else 'poor'} from {name}"}
            )
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


def shown(body: Any) -> tuple[str, str]:
    """The two answers of a request, in the order in which they are shown."""
    text = body["messages"][-1]["content"]
    first, second = (text.split(f"[Answer {letter}]\n")[1].split("\n[End")[0] for letter in "AB")
    return first, second


def fair(body: Any, number: int = 0) -> Any:
    first, second = ("good" in one for one in shown(body))
    return said(f"One is better. [[{'C' if first == second else 'A' if first else 'B'}]]")


def run(capfd: Any, server: Asked, out: Path, *more: object, status: int = 0) -> str:
    a, b = out.parent / "a.jsonl", out.parent / "b.jsonl"
    fixed = ["--a", a, "--b", b, "--out_dir", out, "--judge.base_url", server.url, "--judge.model", "m"]
    return run_script(capfd, "judge", *fixed, *more, status=status)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(openai_client.time, "sleep", found.append)
    return found


def test_known_verdicts(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-known")
    answers(tmp_path)
    (tmp_path / "human.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"question {i}?", "winner": w}) + "\n"
            for i, w in enumerate(["a", "a", "b", "tie", "B"])
        )
    )
    more = ["--human", tmp_path / "human.jsonl", "--write_pairs", tmp_path / "pairs.jsonl", "--judge.body", "{seed: 3}"]
    with serving(fair) as server:
        out = run(capfd, server, tmp_path / "out", *more)
    assert "8 of 8 pairs judged: a wins 4, b wins 2, ties 2" in out
    assert "win rate of a, ties as halves  62.5% (95%: 30.6% to 86.3%) of 8" in out
    assert "without ties                   66.7% (95%: 30.0% to 90.3%) of 6" in out
    assert "the first shown wins 50.0%" in out and "both orders agree              100.0%" in out
    assert "agreement with people          60.0%" in out and "where neither says tie         75.0%" in out
    assert "tokens: 112 of prompts, 32 of replies" in out
    assert len(server.requests) == 16
    body = server.requests[0][1]
    assert {k: body[k] for k in ("model", "max_tokens", "temperature", "seed")} == {
        "model": "m", "max_tokens": 512, "temperature": 0.0, "seed": 3
    }  # fmt: skip
    kept = lines(tmp_path / "out/verdicts.jsonl")
    assert {(one["pair"], one["order"]) for one in kept} == {(i, order) for i in range(8) for order in ("ab", "ba")}
    assert all(one["messages"][0]["content"].startswith("Two assistants") and one["reply"] for one in kept)
    results = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert (results["a"], results["b"], results["tie"], results["win_rate"]) == (4, 2, 2, 0.625)
    pairs = read_preferences(str(tmp_path / "pairs.jsonl"), True, True)
    assert len(pairs) == 6 and pairs[0].completions[0][0]["content"] == "good from a"
    assert all("good" in pair.completions[0][0]["content"] for pair in pairs)
    written = [file.read_text() for file in (tmp_path / "out").iterdir()]
    assert not any("sk-known" in text for text in written) and "sk-known" not in out


def test_a_request_is_one_that_the_openai_client_sends(tmp_path, capfd):
    """The same body, byte by byte but for their order, and a reply that it reads."""
    answers(tmp_path, 1)
    with serving(fair) as server:
        run(capfd, server, tmp_path / "out", "--judge.concurrency", 1)
        body = dict(server.requests[0][1])
        reply = openai.OpenAI(base_url=server.url, api_key="none").chat.completions.create(**body)
    assert reply.choices[0].message.content == "One is better. [[A]]"
    (path, ours, _), (other_path, theirs, _) = server.requests[0], server.requests[2]
    assert path == other_path and ours == theirs


def test_a_judge_that_prefers_the_first_answer(tmp_path, capfd):
    answers(tmp_path)
    with serving(lambda *_: said("[[A]]")) as server:
        out = run(capfd, server, tmp_path / "out")
    assert "a wins 0, b wins 0, ties 8" in out and "the first shown wins 100.0%" in out
    assert "both orders agree              0.0%" in out and "win rate of a, ties as halves  50.0%" in out


def test_a_judge_that_prefers_the_longer_answer(tmp_path, capfd):
    answers(tmp_path)
    rows = lines(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps(row | {"answer": row["answer"] + " and more"}) + "\n" for row in rows)
    )
    with serving(lambda body, _: said("[[A]]" if len(shown(body)[0]) > len(shown(body)[1]) else "[[B]]")) as server:
        out = run(capfd, server, tmp_path / "out")
    assert "length: the longer wins        100.0%" in out and "a has 5 words, b 3" in out


def test_interrupted_and_repeated(tmp_path, capfd, waits):
    """Nothing is asked twice, also after the last line was cut off."""
    answers(tmp_path)
    with serving(lambda body, number: fair(body) if number < 5 else (503, b"busy", {})) as server:
        error = run(capfd, server, tmp_path / "out", "--judge.tries", 2, "--judge.concurrency", 1, status=1)
    assert "5 requests in a row failed" in error and "503: busy" in error and "repeat the command" in error
    assert len(lines(tmp_path / "out/verdicts.jsonl")) == 5
    assert 15 <= len(server.requests) <= 17, "another request may be under way"
    with (tmp_path / "out/verdicts.jsonl").open("a") as file:
        file.write('{"pair": 7, "or')
    with serving(fair) as server:
        run(capfd, server, tmp_path / "out")
        assert len(server.requests) == 11
        out = run(capfd, server, tmp_path / "out")
        assert len(server.requests) == 11 and "a wins 4, b wins 2, ties 2" in out
        error = run(capfd, server, tmp_path / "out", "--judge.temperature", 1, status=1)
    assert "verdicts of another comparison: temperature differ" in error


def test_a_verdict_that_fails_is_asked_for_again(tmp_path, capfd, waits):
    """One prompt is too long for the judge."""
    answers(tmp_path)

    def long(body: Any, _: int) -> Any:
        return (400, {"error": {"message": "too long"}}, {}) if "question 3" in str(body) else fair(body)

    with serving(long) as server:
        error = run(capfd, server, tmp_path / "out", status=1)
    assert "2 verdicts missing" in error and "400: too long" in error
    results = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert (results["pairs"], results["judged"], results["b"]) == (8, 7, 1)
    with serving(fair) as server:
        assert "8 of 8 pairs judged" in run(capfd, server, tmp_path / "out")
        assert len(server.requests) == 2


def test_a_rate_limit(tmp_path, capfd, waits):
    answers(tmp_path)
    lock, refused = threading.Lock(), set[str]()

    def limited(body: Any, _: int) -> Any:
        with lock:
            key = str(body)
            if key not in refused:
                refused.add(key)
                return 429, {"error": {"message": "slower"}}, {"Retry-After": "7"}
        return fair(body)

    with serving(limited) as server:
        assert "8 of 8 pairs judged" in run(capfd, server, tmp_path / "out")
    assert waits == [7.0] * 16


def test_a_judge_that_answers_nonsense(tmp_path, capfd):
    answers(tmp_path)
    with serving(lambda body, _: said("Well ...") if "question 1" in str(body) else fair(body)) as server:
        out = run(capfd, server, tmp_path / "out")
        assert "7 of 8 pairs judged" in out and "verdicts that said neither     2; their pairs are left out" in out
    with serving(lambda *_: said("Bananas, always.")) as server:
        error = run(capfd, server, tmp_path / "other", status=1)
    assert "named no winner in any of its replies; the first: 'Bananas, always.'" in error
    assert len(lines(tmp_path / "other/verdicts.jsonl")) == 16


def test_a_line_that_is_no_verdict_is_named(tmp_path):
    VerdictFile(tmp_path / "out", {}).close()
    for line in ("[1]", '{"pair": 1}', '{"pair": 1, "order": "ab", "winner": "a", "other": 2}', "{"):
        (tmp_path / "out/verdicts.jsonl").write_text(line + "\n")
        with pytest.raises(UserError, match=r"verdicts.jsonl is damaged: .* Remove its broken line"):
            VerdictFile(tmp_path / "out", {})


@pytest.mark.parametrize(
    ("reply", "winner"),
    [
        ("[[A]]", "a"),
        ("First I thought [[A]], but no.\n[[B]]", "b"),
        ("[[c]]", "tie"),
        ("[[tie]]", "tie"),
        (" **A**. ", "a"),
        ("A is better", None),
        ("", None),
    ],
)
def test_reading_a_verdict(reply, winner):
    turned = {"a": "b", "b": "a"}.get(winner, winner)
    assert read_verdict(reply, "ab") == winner and read_verdict(reply, "ba") == turned


def test_an_answer_cannot_take_the_place_of_another():
    pair = Pair(0, [{"role": "user", "content": "q {first}"}], "mine {second}", "yours")
    text = question("{question} | {first} | {second}", pair, "ba")
    assert text == "q {first} | yours | mine {second}"


def test_a_prompt_of_ones_own(tmp_path):
    (tmp_path / "own.txt").write_text("{question} {first}")
    with pytest.raises(judges.UserError, match=r"lacks \{second\}"):
        read_template(str(tmp_path / "own.txt"))


def test_the_only_model_is_taken(tmp_path, capfd):
    answers(tmp_path)

    def answer(body: Any, _: int) -> Any:
        return fair(body) if body else (200, {"data": [{"id": name} for name in models]}, {})

    models = ["one"]
    with serving(answer) as server:
        run(capfd, server, tmp_path / "out", "--judge.model", "")
        assert server.requests[1][1]["model"] == "one"
        models += ["two"]
        assert "has the models one, two: name one" in run(capfd, server, tmp_path / "x", "--judge.model", "", status=1)


def test_our_own_server_as_a_judge(tmp_path, tiny_dir, capfd):
    """Its random weights say nothing useful, and that is what is reported."""
    answers(tmp_path, 2)
    words = [sys.executable, ROOT / "scripts/serve.py", "--checkpoint_dir", tiny_dir, "--port", "0"]
    with subprocess.Popen(
        list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            assert process.stdout is not None
            line = next(line for line in process.stdout if "http://" in line)
            url = line[line.index("http://") :].split()[0].rstrip("/").removesuffix("/v1") + "/v1"
            server = Asked(0)
            server.url = url
            (tmp_path / "short.txt").write_text("{question} {first} {second} Which is better, A or B?")
            more = ["--judge.model", "", "--judge.max_tokens", 4, "--judge.prompt", tmp_path / "short.txt"]
            error = run(capfd, server, tmp_path / "out", *more, status=1)
        finally:
            process.terminate()
    kept = lines(tmp_path / "out/verdicts.jsonl")
    assert "named no winner" in error and len(kept) == 4
    assert all(one["prompt_tokens"] > 20 and 0 < one["completion_tokens"] <= 4 for one in kept)


def test_a_reward_model_as_a_judge(tmp_path, capfd, monkeypatch):
    answers(tmp_path)

    class Scores:
        def __init__(self, *given: Any) -> None:
            pass

        def score(self, conversations: Any) -> list[float]:
            return [float("nan") if "question 7" in str(p) else float("good" in text) for p, text in conversations]

    monkeypatch.setattr("litmini.evaluation.rewards.RewardModel", Scores)
    words = [
        "--a",
        tmp_path / "a.jsonl",
        "--b",
        tmp_path / "b.jsonl",
        "--out_dir",
        tmp_path / "out",
        "--reward_model",
        "r",
    ]
    error = run_script(capfd, "judge", *words, "--write_pairs", tmp_path / "p.jsonl", status=1)
    assert "1 verdict missing (the first: pair 8: an answer is beyond" in error
    results = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert (results["a"], results["b"], results["tie"], results["judged"]) == (
        4,
        2,
        1,
        7,
    ) and "first_wins" not in results
    assert [row["margin"] for row in lines(tmp_path / "p.jsonl")] == [1.0] * 6


# What verdicts come to


def test_winners_need_both_orders():
    pairs = [Pair(i, "q", "a", "b") for i in range(4)]
    verdicts = [Verdict(0, "ab", "a"), Verdict(0, "ba", "a"), Verdict(1, "ab", "a"), Verdict(1, "ba", "b")]
    verdicts += [Verdict(2, "ab", "b"), Verdict(3, "ab", "b"), Verdict(3, "ba", None)]
    assert winners(pairs, verdicts) == {0: "a", 1: "tie"}
    assert summarize(pairs, [])["win_rate"] is None


# Files


def test_pairs_are_found_by_prompt(tmp_path):
    rows = {"a": [("p", "1"), ("p", "2"), ("q", "3")], "b": [("q", "x"), ("p", "y"), ("r", "z"), ("p", "w")]}
    for name, given in rows.items():
        (tmp_path / name).with_suffix(".jsonl").write_text(
            "".join(json.dumps({"messages": [{"role": "user", "content": p}], "completion": c}) + "\n" for p, c in given)
            + json.dumps({"prompt": "bad", "error": "too long"}) + "\n"
        )  # fmt: skip
    pairs, alone = read_pairs(str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    assert [(pair.question, pair.a, pair.b) for pair in pairs] == [("p", "1", "y"), ("p", "2", "w"), ("q", "3", "x")]
    assert alone == 1
    (tmp_path / "h.jsonl").write_text('{"prompt": "p", "winner": "draw"}\n{"prompt": "other", "winner": "a"}\n')
    assert read_human(str(tmp_path / "h.jsonl"), pairs) == {0: "tie"}


@pytest.mark.parametrize(
    ("a", "says"),
    [
        ('{"prompt": "p"}', "expected prompt or messages, and answer"),
        ('{"prompt": "p", "answer": 3}', "answer is no text"),
        ("[1]", "no JSON object"),
        ('{"prompt": "x", "answer": "y"}', "have no prompt in common"),
        ('{"prompt": "x", "error": "y"}', "has no answers"),
    ],
)
def test_files_that_are_no_answers(tmp_path, capfd, a, says):
    answers(tmp_path)
    (tmp_path / "a.jsonl").write_text(a + "\n")
    with serving(fair) as server:
        assert says in run(capfd, server, tmp_path / "out", status=1)
    assert not server.requests and not (tmp_path / "out").exists()


def test_settings_that_are_refused(tmp_path, capfd):
    answers(tmp_path)
    words = ["--a", "a", "--b", "b", "--out_dir", tmp_path]
    assert "expected either --judge.base_url URL or" in run_script(capfd, "judge", *words, status=2)
    with serving(fair) as server:
        (tmp_path / "pairs.jsonl").write_text("")
        assert "exists already" in run(
            capfd, server, tmp_path / "o", "--write_pairs", tmp_path / "pairs.jsonl", status=1
        )
        taken = run_script(
            capfd, "judge", "--a", tmp_path / "a.jsonl", "--b", tmp_path / "b.jsonl", "--out_dir", tmp_path,
            "--judge.base_url", server.url, "--judge.model", "m", status=1,
        )  # fmt: skip
        assert "is not empty and has no verdicts" in taken
    assert not server.requests
