"""What the tests of the server share."""

import pytest
from torch import nn

import litmini
from litmini.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def base(tiny_dir) -> tuple[nn.Module, Tokenizer]:
    return litmini.load(tiny_dir, dtype="fp32")
