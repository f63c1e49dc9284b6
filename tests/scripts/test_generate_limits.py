"""generate.py with extreme settings, conversations of any order, and checkpoints whose parts do not fit together."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from test_scripts import run

import litmini
from litmini.checkpoints.hf import save_model
from litmini.errors import UserError
from litmini.evaluation.lm_eval_harness import log_likelihoods
from litmini.evaluation.metrics import perplexity
from litmini.models import llama

PLAIN = (
    "{% if messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def fewer_rows(tmp_path_factory, tokenizer_dir) -> Path:
    """A model with 400 rows and a tokenizer of 512 ids."""
    directory = tmp_path_factory.mktemp("fewer")
    config = dataclasses.replace(llama.PRESETS["tiny"], vocab_size=400)
    model = llama.Model(config)
    model.init_weights(torch.Generator().manual_seed(0))
    save_model(directory, llama.config_to_hf(config), model.state_dict().items(), side_files=tokenizer_dir)
    return directory


def test_extreme_settings_are_greedy(tiny_dir):
    words = [
        "--checkpoint_dir",
        tiny_dir,
        "--dtype=fp32",
        "--prompt=Two mugs, two mugs",
        "--max_new_tokens=6",
        "--ignore_eos",
    ]
    plain = run("generate.py", *words)
    for more in (["--temperature=1e-40"], ["--temperature=1", "--top_p=1e-300"], ["--prompt_lookup=100000"]):
        assert run("generate.py", *words, *more) == plain
    run("generate.py", *words, "--temperature=1", "--repetition_penalty=1e-40")


def test_ids_beyond_the_model_are_named(fewer_rows, tmp_path):
    model, tokenizer = litmini.load(fewer_rows, dtype="fp32")
    beyond = next(tokenizer.decode([i]) for i in range(400, 512) if tokenizer.encode(tokenizer.decode([i])) == [i])
    words = ["--checkpoint_dir", fewer_rows, "--dtype=fp32", "--max_new_tokens=3", "--chat_template=none"]
    error = run("generate.py", *words, "--prompt", beyond, status=1)
    assert "the model has rows for 0 to 399 only" in error and "Traceback" not in error
    questions = tmp_path / "questions.jsonl"
    questions.write_text(
        "".join(json.dumps({"prompt": text}) + "\n" for text in ("a", f"a{beyond}", f"{beyond} a", "b"))
    )
    run("generate.py", *words, "--prompts", questions, "--out", tmp_path / "answers.jsonl", status=1)
    found = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert ["error" in answer for answer in found] == [False, True, True, False]
    assert found[3]["answer"] == litmini.generate(model, type(tokenizer)(fewer_rows, "none"), "b", max_new_tokens=3)


def test_a_draft_model_with_fewer_rows_or_another_tokenizer(tiny_dir, fewer_rows, tmp_path):
    words = ["--dtype=fp32", "--prompt=Two mugs, two mugs", "--max_new_tokens=20", "--ignore_eos"]
    for model, draft in ((tiny_dir, fewer_rows), (fewer_rows, tiny_dir)):
        plain = run("generate.py", "--checkpoint_dir", model, *words)
        assert run("generate.py", "--checkpoint_dir", model, *words, "--draft_dir", draft) == plain
    other = Path(shutil.copytree(tiny_dir, tmp_path / "other"))
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    error = run("generate.py", "--checkpoint_dir", tiny_dir, *words, "--draft_dir", other, status=1)
    assert "its tokens have other ids" in error


@pytest.mark.parametrize("template", [None, PLAIN])
def test_a_conversation_that_the_assistant_begins(tiny_dir, tmp_path, template):
    turns = [{"role": "assistant", "content": "Hello, how can I help?"}, {"role": "user", "content": "Name a colour."}]
    questions, words = (
        tmp_path / "questions.jsonl",
        ["--checkpoint_dir", tiny_dir, "--dtype=fp32", "--max_new_tokens=3"],
    )
    questions.write_text(json.dumps({"messages": turns}) + "\n")
    if template is not None:
        (tmp_path / "plain.jinja").write_text(template)
        words += ["--chat_template", tmp_path / "plain.jinja"]
    run("generate.py", *words, "--prompts", questions, "--out", tmp_path / "answers.jsonl")
    model, tokenizer = litmini.load(tiny_dir, dtype="fp32")
    (found,) = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    assert found["answer"] == litmini.generate(model, tokenizer, turns, max_new_tokens=3)
    assert tokenizer.decode(tokenizer.encode_prompt(turns), skip_special=False).count("how can I help?") == 1


def test_weights_of_nan(tiny_dir, tmp_path):
    model, _ = litmini.load(tiny_dir, dtype="fp32")
    state = model.state_dict()
    state["model.norm.weight"][3] = torch.nan
    save_model(tmp_path, llama.config_to_hf(model.config), state.items(), side_files=tiny_dir)
    words = ["--checkpoint_dir", tmp_path, "--prompt=Hi", "--max_new_tokens=3"]
    error = run("generate.py", *words, status=1)
    assert "logits are not finite" in error and "--check_finite true" in error and "Traceback" not in error
    error = run("generate.py", *words, "--check_finite=true", status=1)
    assert "model.norm.weight" in error and "Traceback" not in error


def test_ids_beyond_the_model_in_training_and_evaluation(fewer_rows, tmp_path):
    """The example is named; a tokenizer with more ids than the model has rows is fine as long as none of them occurs."""
    model, tokenizer = litmini.load(fewer_rows, dtype="fp32")
    beyond = next(tokenizer.decode([i]) for i in range(400, 512) if tokenizer.encode(tokenizer.decode([i])) == [i])
    data = {"good": ["a", "b", "a b", "b a"], "bad": ["a", "b", f"a{beyond}", "b a"]}
    for name, texts in data.items():
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"prompt": "a", "completion": t}) + "\n" for t in texts)
        )
    words = [
        "--checkpoint_dir",
        fewer_rows,
        "--lora.rank=2",
        "--eval.samples=0",
        "--dry_run=true",
        "--data.max_seq_len=32",
    ]
    words += ["--out_dir", tmp_path / "run", "--data.path"]
    run("finetune_lora.py", *words, tmp_path / "good.jsonl")
    error = run("finetune_lora.py", *words, tmp_path / "bad.jsonl", status=1)
    assert "bad.jsonl:3: token id" in error and "rows for 0 to 399 only" in error and "Traceback" not in error
    for check in (
        lambda: perplexity(model, tokenizer, f"a b a{beyond}", 8, 4),
        lambda: log_likelihoods(model, [([1], [450])]),
    ):
        with pytest.raises(UserError, match="rows for 0 to 399 only"):
            check()
