"""No conversion needs more than two of its own shards, whatever the size of the model and its files."""

import shutil
import sys
from pathlib import Path

import pytest
from conversion_memory import LARGEST, LAYER_BYTES, WAYS, measure


@pytest.mark.skipif(sys.platform != "linux", reason="measured with Linux's /proc")
def test_a_model_larger_than_the_memory(tmp_path: Path) -> None:
    """210 MB in 80 MB more than the interpreter has; what is taken, mapped files included, is a few tensors of 13 MB."""
    shard, n_layers = 40_000_000, 4
    found = measure(tmp_path, n_layers, shard, limit=80_000_000)
    print("more than the interpreter, in MB:", {name: round(row["peak"] / 1e6) for name, row in found.items()})
    assert found.keys() == WAYS.keys()
    assert all(row["read"] + row["written"] > n_layers * LAYER_BYTES for row in found.values())
    assert all(0 < row["peak"] < 5 * LARGEST < 2 * shard for row in found.values()), found
    shutil.rmtree(tmp_path)  # 1.6 GB
