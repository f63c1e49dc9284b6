"""Measure litmini's choices for CPUs: attention kernel, chunks of the loss, padded lengths, GEMV.

    OMP_NUM_THREADS=2 python scripts/bench/cpu_choices.py

The alternatives of a row run in turns in one process. Times are medians in ms; a star marks litmini's choice. Shapes are
those of SmolLM2-135M. Run this on an otherwise idle machine.
"""

import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

from work import hardware, versions  # noqa: E402

from litmini.ops import attention, cpu_attention, cross_entropy  # noqa: E402

HEADS, KV_HEADS, HEAD_DIM, DIM, FFN_DIM, VOCAB = 9, 3, 64, 576, 1536, 49_152
TOKENS = 2048
DTYPES = (torch.float32, torch.bfloat16)


def medians(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median ms of each alternative, run in turns; the first two rounds warm up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 2):
        for name, function in ways.items():
            started = time.perf_counter()
            function()
            if number > 1:
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


def show(question: str, found: dict[str, float], taken: str) -> None:
    print(
        f"| {question} | " + ", ".join(f"{n}{'*' * (n == taken)} {ms:.2f}" for n, ms in found.items()) + " |",
        flush=True,
    )


def attention_kernels() -> None:
    """Compare two matmuls and a softmax with torch's fused kernel, forward and backward, on documents of one length."""
    limits = ("EXPLICIT_LENGTH", "EXPLICIT_LENGTH_FP32")
    before = {name: getattr(cpu_attention, name) for name in limits}
    for dtype, windowed, length in itertools.product(DTYPES, (False, True), (32, 128, 256, 512, 1024, 2048)):
        shape = (max(1, TOKENS // length), length, HEAD_DIM)
        q, k, v = (torch.randn(shape[0], h, *shape[1:]).to(dtype).requires_grad_() for h in (HEADS, KV_HEADS, KV_HEADS))
        positions = torch.arange(length).expand(shape[0], length)
        mask = attention.make_mask(positions, None, None, length // 2 if windowed else None)

        def run(limit: int, q=q, k=k, v=v, mask=mask) -> None:  # type: ignore[no-untyped-def]
            for name in limits:
                setattr(cpu_attention, name, limit)
            attention.attend(q, k, v, mask).sum().backward()

        found = medians({"explicit": lambda: run(1 << 30), "fused": lambda: run(0)}, 9)
        limit = before[limits[dtype == torch.float32]]
        show(
            f"attention, {str(dtype)[6:]}, {shape[0]} x {length}{', window' * windowed}",
            found,
            "explicit" if length <= limit else "fused",
        )
    for name, value in before.items():
        setattr(cpu_attention, name, value)


def loss_chunks() -> None:
    """Compare the number of rows of logits in a chunk, with a frozen and with a trained head."""
    for dtype, trained in itertools.product(DTYPES, (False, True)):
        head = torch.nn.Linear(DIM, VOCAB, bias=False).to(dtype).requires_grad_(trained)
        hidden = torch.randn(1, 1024, DIM).to(dtype).requires_grad_()
        labels = torch.randint(0, VOCAB, (1, 1024))

        def run(chunk: int, head=head, hidden=hidden, labels=labels) -> None:  # type: ignore[no-untyped-def]
            cross_entropy.linear_cross_entropy(hidden, head, labels, chunk=chunk)[0].backward()
            head.zero_grad()

        found = medians({str(c): lambda c=c: run(c) for c in (64, 256, 512, 1024)}, 5)  # type: ignore[misc]
        taken = cross_entropy.TRAINED_CHUNK if trained else cross_entropy.CHUNK
        show(
            f"loss, {str(dtype)[6:]}, {'trained' if trained else 'frozen'} head, rows of logits at once",
            found,
            str(taken),
        )


def rounded_lengths() -> None:
    """Compare exact and rounded lengths in scores of documents: oneDNN compiles code for each new shape."""
    lengths = torch.randperm(400, generator=torch.Generator().manual_seed(0))[:200].add(33).tolist()
    for dtype in DTYPES:
        times = {"as they are": 0.0, "rounded": 0.0}
        for length in lengths:
            for name in times:
                n = cpu_attention._round_up(length) if name == "rounded" else length
                q, k = torch.randn(KV_HEADS, 3 * n, HEAD_DIM).to(dtype), torch.randn(KV_HEADS, HEAD_DIM, n).to(dtype)
                started = time.perf_counter()
                torch.bmm(q, k)
                times[name] += 1e3 * (time.perf_counter() - started) / len(lengths)
        show(f"scores of 200 documents, {str(dtype)[6:]}, first time", times, "rounded")


@torch.no_grad()
def matrix_vector() -> None:
    """Compare oneDNN with torch's GEMV on one token."""
    for rows, columns in ((FFN_DIM, DIM), (DIM, FFN_DIM), (VOCAB, DIM)):
        x, weight = torch.randn(1, columns).bfloat16(), torch.randn(rows, columns).bfloat16()

        def run(enabled: bool, x=x, weight=weight) -> None:  # type: ignore[no-untyped-def]
            torch.backends.mkldnn.enabled = enabled  # type: ignore[assignment]
            for _ in range(20):
                torch.nn.functional.linear(x, weight)

        found = medians({"oneDNN": lambda: run(True), "torch": lambda: run(False)}, 9)
        torch.backends.mkldnn.enabled = True  # type: ignore[assignment]
        show(f"20 GEMVs, bfloat16, {rows} x {columns}", found, "oneDNN")


if __name__ == "__main__":
    isa, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    print(f"{hardware()['cpu']}, {isa}, {threads} threads, torch {versions()['torch']}")
    print("| what | ms |\n|---|---|")
    attention_kernels()
    loss_chunks()
    rounded_lengths()
    matrix_vector()
