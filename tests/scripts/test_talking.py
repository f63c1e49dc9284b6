"""generate, chat, serve and evaluate through their command lines."""

import io
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import openai
import pytest
import torch
from test_scripts import ROOT, SCRIPTS, run
from torch import nn

import litmini
from litmini.checkpoints.peft import save_adapter
from litmini.config.finetune import LoraConfig
from litmini.generation.batch import Batch
from litmini.generation.request import Request
from litmini.methods.adapters import add_adapters
from litmini.models import llama
from litmini.tokenizer import Tokenizer

WORDS = ("--dtype", "fp32")


@pytest.fixture(scope="module")
def base(tiny_dir) -> list[str | Path]:
    return ["--checkpoint_dir", tiny_dir, *WORDS]


@pytest.fixture(scope="module")
def loaded(tiny_dir):
    return litmini.load(tiny_dir, dtype="fp32")


# generate.py


def test_the_checkpoint_may_be_the_current_directory(tiny_dir, tmp_path, monkeypatch):
    """Its name is then not in what was typed."""
    monkeypatch.chdir(tiny_dir)
    (tmp_path / "sub").mkdir()
    for place in (".", "./", f"{tmp_path}/sub/../../{tmp_path.name}/link"):
        if place.endswith("link"):
            (tmp_path / "link").symlink_to(tiny_dir)
        output = run("generate.py", "--checkpoint_dir", place, "--prompt", "hi", "--max_new_tokens", 3, *WORDS)
        assert output.strip()


def test_a_file_of_a_thousand_prompts_with_broken_lines(base, loaded, tmp_path):
    """The rest is done, in order and equal to each alone; the lines are named."""
    asked = [f"Say {n % 7} {'and more ' * (n % 5)}" for n in range(1000)]
    lines = [json.dumps({"prompt": text, "id": n}) for n, text in enumerate(asked)]
    broken = {
        13: "{",
        200: "[3]",
        201: '{"text": "x"}',
        500: '{"messages": [{"role": "user"}]}',
        501: '{"prompt": "' + "a " * 600 + '"}',
        502: '{"prompt": "\\ud800"}',
        999: '{"prompt": ""}',
    }
    content = (
        "\n".join(broken.get(n, line) for n, line in enumerate(lines)).encode().replace(b'"id": 600', b'"id": "\xff"')
    )
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    questions.write_bytes(content)
    options = ["--max_new_tokens=3", "--batch_size=250", "--chat_template=none"]
    error = run("generate.py", *base, "--prompts", questions, "--out", answers, *options, status=1)
    wrong = [int(n) for n in re.findall(r"questions\.jsonl:(\d+): ", error)]
    assert wrong == [14, 201, 202, 501, 502, 503, 601, 1000]
    found = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [a["line"] for a in found] == list(range(1, 1001))
    assert [a["line"] for a in found if "error" in a] == wrong
    assert (
        "not valid JSON" in found[13]["error"]
        and "no token remains" in found[501]["error"]
        and "empty" in found[999]["error"]
    )
    model, tokenizer = loaded
    tokenizer = Tokenizer(tokenizer.directory, "none")
    for n in (0, 1, 4, 333, 998):
        assert found[n]["answer"] == litmini.generate(model, tokenizer, asked[n], max_new_tokens=3)
        assert found[n]["id"] == n and found[n]["n_tokens"] <= 3 and found[n]["finish_reason"] in ("length", "stop")
    assert "exists already" in run("generate.py", *base, "--prompts", questions, "--out", answers, status=1)


def test_messages_seeds_and_logprobs_of_a_file(base, tmp_path):
    questions = tmp_path / "questions.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    questions.write_text((json.dumps({"messages": turns}) + "\n") * 2)
    options = ["--temperature=1.5", "--seed=3", "--logprobs=2", "--max_new_tokens=6", "--ignore_eos", "--system=Hm."]
    texts = []
    for name in ("one", "two"):
        run("generate.py", *base, "--prompts", questions, "--out", tmp_path / name, *options)
        texts.append((tmp_path / name).read_text())
    first, second = map(json.loads, texts[0].splitlines())
    assert texts[0] == texts[1] and first["answer"] != second["answer"]
    assert len(first["logprobs"]) == 6 and all(len(t["top_logprobs"]) == 2 for t in first["logprobs"])


def test_drafts_say_what_plain_decoding_says(base, tiny_dir):
    words = [*base, "--prompt=Two mugs, two mugs, two", "--max_new_tokens=30", "--ignore_eos"]
    plain = run("generate.py", *words)
    assert run("generate.py", *words, "--prompt_lookup=4") == plain
    assert run("generate.py", *words, "--draft_dir", tiny_dir) == plain
    assert "temperature 0" in run("generate.py", *words, "--prompt_lookup=4", "--temperature=1", status=1)


def make_adapter(directory: Path, checkpoint: Path, base: nn.Module) -> Path:
    """An adapter that changes much."""
    add_adapters(base, LoraConfig(rank=4, alpha=64))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in base.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, generator=generator)
    directory.mkdir()
    save_adapter(base, directory, str(checkpoint))
    return directory


def test_four_bits_and_an_adapter(tiny_dir, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", tiny_dir, litmini.load(tiny_dir, dtype="fp32")[0])
    words = ["--checkpoint_dir", tiny_dir, "--prompt=Hi", "--max_new_tokens=8", "--ignore_eos", "--dtype=fp32"]
    found = {}
    for bits in (4, 16):
        for directory in (None, adapter):
            model, tokenizer = litmini.load(tiny_dir, directory, dtype="fp32", bits=bits)
            said = run("generate.py", *words, f"--bits={bits}", *(["--adapter_dir", adapter] if directory else []))
            assert said == litmini.generate(model, tokenizer, "Hi", max_new_tokens=8, ignore_eos=True) + "\n"
            found[bits, directory] = said
    assert found[4, None] != found[16, None] != found[16, adapter] and found[4, None] != found[4, adapter]


def test_an_adapter_of_another_base(base, tiny_dir, tmp_path):
    other = llama.Model(replace(llama.PRESETS["tiny"], n_layers=3, ffn_dim=192))
    adapter = make_adapter(tmp_path / "adapter", tiny_dir, other)
    (tmp_path / "text.txt").write_text("some text")
    for words in (
        ("generate.py", *base, "--prompt=x", "--adapter_dir", adapter),
        ("chat.py", *base, "--adapter_dir", adapter),
        ("evaluate.py", *base, "--perplexity", tmp_path / "text.txt", "--adapter_dir", adapter),
        ("serve.py", *base, "--port=0", "--adapters", json.dumps({"other": str(adapter)})),
    ):
        error = run(*words, status=1)
        assert f"{adapter} was made for another base" in error and "layers.2" in error


def test_a_stop_string_that_never_comes(base, tmp_path):
    questions, words = tmp_path / "questions.jsonl", ["--max_new_tokens=9", "--ignore_eos"]
    questions.write_text('{"prompt": "Say 7."}\n' * 2)
    answers = []
    for name, more in (("with", ["--stop=[never, '\\n\\n\\n\\n']"]), ("without", [])):
        run("generate.py", *base, "--prompts", questions, "--out", tmp_path / name, *words, *more)
        answers += map(json.loads, (tmp_path / name).read_text().splitlines())
    assert all(a["finish_reason"] == "length" and a["n_tokens"] == 9 for a in answers)
    assert len({a["answer"] for a in answers}) == 1


def test_a_terminal_that_knows_no_such_letter(base, tiny_dir, monkeypatch):
    """As one whose locale is not UTF-8: the answer goes on."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("litmini.generation.generate.stream_text", lambda *_: iter(["na", "ï", "ve"]))
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.argv", ["generate.py", *map(str, base), "--prompt=x"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(SCRIPTS / "generate.py"), run_name="__main__")
    out.seek(0)
    assert out.read() == "na?ve\n"


@pytest.mark.parametrize(
    ("words", "status", "expected"),
    [
        (["--prompt=x", "--top_p=0"], 2, "out of range: top_p is 0.0"),
        (["--prompt=x", "--stop=['']"], 2, "out of range: stop is ['']"),
        (["--prompt=x", "--min_p=2", "--logprobs=21"], 2, "out of range: min_p is 2.0, logprobs is 21"),
        ([], 2, "expected either --prompt TEXT, or --prompts FILE with --out FILE"),
        (["--prompts=x.jsonl"], 2, "expected either --prompt TEXT, or --prompts FILE with --out FILE"),
        (["--prompts=nowhere.jsonl", "--out=nowhere.out"], 1, "file of prompts not found"),
        (["--prompt=", "--chat_template=none"], 1, "the prompt is empty"),
        (["--prompt=x", "--chat_template=bad.jinja"], 1, "fails on these messages: not that"),
    ],
)
def test_generate_refuses_bad_input(base, tmp_path, monkeypatch, words, status, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jinja").write_text(
        "{{ raise_exception('not that') if messages[0]['content'] == 'x' else 'fine' }}"
    )
    assert expected in run("generate.py", *base, *words, status=status)
    assert not (tmp_path / "nowhere.out").exists()


# chat.py


def chat(lines: list[str], *words, monkeypatch, capsys) -> tuple[str, str]:
    """What a conversation prints, on stdout and stderr."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    monkeypatch.setattr("sys.argv", ["chat.py", *map(str, words)])
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(SCRIPTS / "chat.py"), run_name="__main__")
    return tuple(capsys.readouterr())


def test_a_conversation(base, loaded, tmp_path, monkeypatch, capsys):
    model, tokenizer = loaded
    system = {"role": "system", "content": "Be brief."}
    messages = [system]
    for text in ("Say 7.", "And 8?"):
        messages.append({"role": "user", "content": text})
        answer = litmini.generate(model, tokenizer, messages, max_new_tokens=9)
        messages.append({"role": "assistant", "content": answer})
    alone = litmini.generate(model, tokenizer, [system, {"role": "user", "content": "And 8?"}], max_new_tokens=9)
    assert alone != messages[-1]["content"]
    words = [*base, "--max_new_tokens=9", "--system=Be brief."]
    typed = ["Say 7.", "", "And 8?", f"/save {tmp_path}/talk.jsonl", "/reset", "And 8?", "/quit", "never"]
    printed, _ = chat(typed, *words, monkeypatch=monkeypatch, capsys=capsys)
    said = printed.replace("> ", "")
    assert said == "".join(text + "\n" for text in (messages[2]["content"], messages[4]["content"], alone))
    assert json.loads((tmp_path / "talk.jsonl").read_text())["messages"] == messages
    words = [*base, "--history", tmp_path / "talk.jsonl"]
    chat([f"/save {tmp_path}/again.jsonl"], *words, monkeypatch=monkeypatch, capsys=capsys)
    assert (tmp_path / "again.jsonl").read_text() == (tmp_path / "talk.jsonl").read_text()


def test_chat_says_which_model_it_is_and_what_it_understands(base, tiny_dir, monkeypatch, capsys):
    """Without a terminal, no colors."""
    printed, told = chat(["/help", "/quit"], *base, monkeypatch=monkeypatch, capsys=capsys)
    assert told.startswith(f"{tiny_dir.name}: /help lists the commands") and "\033" not in printed + told
    for command in ("/help ", "/reset ", "/save FILE ", "/quit "):
        assert f"\n{command}" in told
    assert printed.count("> ") == 2


def test_chat_reports_mistakes_and_continues(base, tmp_path, monkeypatch, capsys):
    typed = ["/nonsense", f"/save {tmp_path}", "Say " * 300, "/save", "/quit", "never"]
    printed, errors = chat(typed, *base, "--max_new_tokens=3", monkeypatch=monkeypatch, capsys=capsys)
    assert printed.count(">") == 5 and errors.count("error: ") == 4
    for expected in (
        "/nonsense is not a command",
        "exists",
        "no token remains for a completion",
        "/save is not a command",
    ):
        assert expected in errors
    (tmp_path / "two.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    assert "holds 2 conversations" in run("chat.py", *base, "--history", tmp_path / "two.jsonl", status=1)
    assert "no chat template" in run("chat.py", *base, "--chat_template=none", status=1)


def test_a_completion_that_is_interrupted_stays_in_the_conversation(base, tmp_path, monkeypatch, capsys):
    def interrupted(model: nn.Module, reply: Request):
        batch = Batch(model)
        batch.add([reply])
        for _ in range(4):
            batch.step()
            yield reply.take()
        raise KeyboardInterrupt

    monkeypatch.setattr("litmini.generation.generate.stream_text", interrupted)
    typed = ["Say 7.", f"/save {tmp_path}/talk.jsonl"]
    printed, _ = chat(typed, *base, "--ignore_eos", monkeypatch=monkeypatch, capsys=capsys)
    (turn, answer) = json.loads((tmp_path / "talk.jsonl").read_text())["messages"]
    assert turn["content"] == "Say 7." and answer["content"] and answer["content"] in printed


def test_a_history_that_is_none(base, tmp_path):
    for content in ("", "{", '{"messages": [{"role": "user"}]}', '{"text": "a"}'):
        (tmp_path / "talk.jsonl").write_text(content)
        assert "talk.jsonl" in run("chat.py", *base, "--history", tmp_path / "talk.jsonl", status=1)


# serve.py


def test_serve_and_its_client(base, tiny_dir, tmp_path):
    words = [sys.executable, SCRIPTS / "serve.py", *map(str, base), "--port=0", "--max_body_mib=0.01"]
    environment = {**os.environ, "LITMINI_API_KEY": "secret", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment) as server:
        try:
            line = server.stderr.readline()
            address = re.search(r"http://127\.0\.0\.1:\d+/v1", line)[0]
            assert line.startswith(f"{tiny_dir.name} at ")
            client = openai.OpenAI(base_url=address, api_key="secret", max_retries=0)
            chunks = client.chat.completions.create(
                model=tiny_dir.name,
                messages=[{"role": "user", "content": "Hi"}],
                stream=True,
                max_tokens=5,
                temperature=0,
            )
            text = "".join(chunk.choices[0].delta.content for chunk in chunks)
            assert text + "\n" == run("generate.py", *base, "--prompt=Hi", "--max_new_tokens=5")
            with pytest.raises(openai.AuthenticationError):
                openai.OpenAI(base_url=address, api_key="other", max_retries=0).models.list()
            with pytest.raises((openai.APIStatusError, openai.APIConnectionError)):
                client.completions.create(model=tiny_dir.name, prompt="a" * 100_000)
            taken = run("serve.py", *base, "--port", address.split(":")[2].removesuffix("/v1"), status=1)
            assert "cannot listen at 127.0.0.1" in taken and "--port" in taken
        finally:
            server.send_signal(signal.SIGTERM)
            rest = server.stderr.read()
        assert server.wait(20) in (0, -signal.SIGTERM) and "Traceback" not in rest


def test_serve_refuses(base, tiny_dir):
    assert "is no adapter directory" in run("serve.py", *base, f"--adapters={{a: {tiny_dir}}}", "--port=0", status=1)
    assert "not both" in run("serve.py", *base, "--adapters={a: b}", "--adapter_dir=c", status=2)
    assert "out of range: max_queue is 0" in run("serve.py", *base, "--max_queue=0", status=2)


# evaluate.py


def test_evaluate(base, loaded, tmp_path):
    model, tokenizer = loaded
    (tmp_path / "text.txt").write_text((ROOT / "CONTRIBUTING.md").read_text()[:3000])
    said = litmini.generate(model, tokenizer, "Say 7.", max_new_tokens=5)
    records = [{"prompt": "Say 7.", "completion": said}, {"prompt": "Say 8.", "completion": "no"}]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    words = ["--perplexity", tmp_path / "text.txt", "--exact_match", tmp_path / "questions.jsonl", "--max_new_tokens=5"]
    printed = run("evaluate.py", *base, *words, "--window=64", "--out", tmp_path / "results.json")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["exact_match"]["exact_match"] == 0.5 and results["exact_match"]["wrong"][0]["reference"] == "no"
    assert f"perplexity {results['perplexity']['perplexity']:.3f}" in printed and "exact match 50.0% of 2" in printed
    assert results["perplexity"]["tokens"] == len(tokenizer.encode((tmp_path / "text.txt").read_text())) - 1


def test_a_file_of_results_is_checked_before_and_results_are_printed_before_it_is_written(base, tmp_path):
    (tmp_path / "text.txt").write_text("some words to read " * 50)
    (tmp_path / "there.json").write_text("mine")
    words = ["evaluate.py", *base, "--perplexity", tmp_path / "text.txt", "--window=64"]
    for out, reason in {
        "there.json": "as a file",
        ".": "as a directory",
        "no/dir/x.json": "there is no directory",
    }.items():
        assert reason in run(*words, "--out", tmp_path / out, status=1)
    assert (tmp_path / "there.json").read_text() == "mine"
    (tmp_path / "none.jsonl").write_text('{"text": "no prompt"}\n')
    command = [*words, "--exact_match", tmp_path / "none.jsonl", "--out", tmp_path / "x.json"]
    command = [sys.executable, ROOT / "scripts" / words[0], *command[1:]]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 1 and "perplexity" in done.stdout, done  # what was measured before the failure
    assert "exists already" in run("verify.py", base[1], "--json", tmp_path / "there.json", status=1)


def test_evaluate_refuses(base, tmp_path):
    assert "nothing to measure" in run("evaluate.py", *base, status=2)
    assert "text file not found" in run("evaluate.py", *base, "--perplexity=nowhere.txt", status=1)
    (tmp_path / "bad.txt").write_bytes(b"a\xff")
    assert "is not UTF-8 text" in run("evaluate.py", *base, "--perplexity", tmp_path / "bad.txt", status=1)


# benchmark.py


def test_benchmark_of_generation(tiny_dir, tmp_path):
    words = [
        "--tasks=[generate]",
        "--prompt_tokens=8",
        "--prefill_tokens=[8,12,256]",  # the last fills the context
        "--new_tokens=24",
        "--batch_size=2",
        "--rounds=1",
        "--out",
        tmp_path / "results.json",
    ]
    printed = run("benchmark.py", "--checkpoint_dir", tiny_dir, *words)
    found = json.loads((tmp_path / "results.json").read_text())["generate"]
    assert found["weights_bytes"] == 2 * (sum(p.numel() for p in litmini.load(tiny_dir)[0].parameters()) - 512 * 64)
    for name in ("litmini", "transformers"):
        prefill = found[name]["prefill_tokens_per_second"]
        assert len(found[name]) >= 3 and list(prefill) == ["8", "12"] and min(prefill.values()) > 0
        assert f"| {name} | " in printed
    assert 0.1 < found["litmini"]["seconds_to_first_token"] < 100
