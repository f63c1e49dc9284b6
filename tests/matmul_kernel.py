"""`torch.mm(..., out_dtype=)`, which has no CPU implementation, by its documented contract: sums in fp32 are kept."""

import torch
from torch import Tensor

LIBRARY = torch.library.Library("aten", "IMPL")


def _mm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    assert a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16) and out_dtype == torch.float32
    return a.to(out_dtype) @ b.to(out_dtype)


LIBRARY.impl("mm.dtype", _mm, "CPU")
