"""Prefill and greedy decoding of litmini and, if it is installed, of transformers, in turns in one process.

Each figure is the best of all rounds: other processes on the machine can only slow it down.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any


def benchmark_generate(config: Any) -> dict[str, Any]:
    """Measure tokens per second of prefill and greedy decoding, single and batched, and the bound of memory bandwidth.

    Prefill is the time from the call to the first token.
    """
    import torch

    from litmini.config.generate import SamplingConfig
    from litmini.distributed.fabric import keep_memory
    from litmini.generation.generate import finish_all, open_model
    from litmini.generation.packed_linear import pack_linears
    from litmini.generation.request import Request

    keep_memory()
    model, _ = open_model(config)
    settings: Any = model.config
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if not settings.tied:  # decoding reads one row of an untied embedding
        weights -= max(p.numel() * p.element_size() for n, p in model.named_parameters() if "lm_head" not in n)
    pack_linears(model)
    generator = torch.Generator().manual_seed(0)
    lengths = [n for n in config.prefill_tokens if n < settings.max_positions]
    if too_long := sorted(set(config.prefill_tokens) - set(lengths)):
        print(f"prefill_tokens {too_long} left out: the model's context is {settings.max_positions}", file=sys.stderr)
    texts = [(1, n) for n in lengths] + [(n, config.prompt_tokens) for n in (1, config.batch_size)]
    prompts = {n: torch.randint(settings.vocab_size, n, generator=generator).tolist() for n in dict.fromkeys(texts)}

    def ours(prompts: list[list[int]], count: int) -> None:
        sampling = SamplingConfig(max_new_tokens=count, ignore_eos=True)
        finish_all(model, [Request(prompt, sampling, []) for prompt in prompts])

    engines: dict[str, Callable[[list[list[int]], int], None]] = {"litmini": ours}
    if "transformers" in config.tools and (theirs := reference(config)) is not None:
        engines["transformers"] = theirs
    times: dict[Any, float] = {}
    bandwidth = 0.0
    for run in engines.values():
        for shape in prompts:
            run(prompts[shape], 2)  # warm-up
    cases = [(shape, 1) for shape in prompts] + [(shape, config.new_tokens) for shape in texts[-2:]]
    for _ in range(config.rounds):
        bandwidth = max(bandwidth, read_bandwidth(next(model.parameters()).device))
        for name, run in engines.items():
            for shape, count in cases:
                seconds = timed(partial(run, prompts[shape], count))
                times[name, shape, count] = min(times.get((name, shape, count), float("inf")), seconds)
    found: dict[str, Any] = {"weights_bytes": weights, "bandwidth_bytes_per_second": bandwidth}
    found["bound_tokens_per_second"] = bandwidth / weights
    for name in engines:
        steps = config.new_tokens - 1
        one, batch = (times[name, shape, config.new_tokens] - times[name, shape, 1] for shape in texts[-2:])
        found[name] = {
            "prefill_tokens_per_second": {str(n): n / times[name, (1, n), 1] for n in lengths},
            "decode_tokens_per_second": steps / one,
            f"batch_{config.batch_size}_tokens_per_second": config.batch_size * steps / batch,
        }
    found["litmini"]["seconds_to_first_token"] = min(
        timed(lambda: first_token(config)) for _ in range(min(config.rounds, 3))
    )
    return found


def reference(config: Any) -> Callable[[list[list[int]], int], None] | None:
    """Return the same measurement with transformers, or None if it is not installed."""
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError:
        print("transformers is not installed: only litmini is measured.", file=sys.stderr)
        return None
    dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
    device = "cuda" if config.device == "auto" and torch.cuda.is_available() else config.device.replace("auto", "cpu")
    model = AutoModelForCausalLM.from_pretrained(config.checkpoint_dir, dtype=dtype).eval().to(device)

    def theirs(prompts: list[list[int]], count: int) -> None:
        tokens = torch.tensor(prompts, device=device)
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
            pad_token_id=0,
        )

    return theirs


def timed(run: Callable[[], object]) -> float:
    """Return the seconds of a call."""
    import time

    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def read_bandwidth(device: Any) -> float:
    """Return the bytes per second of a sum over 2 GiB of a GPU's memory, or 256 MiB of a CPU's by all threads.

    A GPU reads 256 MiB in less time than its start takes, and a fifth of them from its cache.
    """
    import torch

    values = torch.ones(2**29 if device.type == "cuda" else 2**26, device=device)
    values.sum().item()
    return max(values.numel() * 4 / timed(lambda: values.sum().item()) for _ in range(3))


def first_token(config: Any) -> None:
    """Run generate.py until its first token."""
    import subprocess
    from pathlib import Path

    script = Path(__file__).parents[1] / "generate.py"
    words = [sys.executable, str(script), "--checkpoint_dir", config.checkpoint_dir]
    words += ["--dtype", config.dtype, "--device", config.device, "--prompt", "Hi", "--max_new_tokens", "1"]
    subprocess.run(words, check=True, capture_output=True)


def report_generate(results: dict[str, Any]) -> str:
    """Return a Markdown table."""
    found = results["generate"]
    bound, lengths = found["bound_tokens_per_second"], found["litmini"]["prefill_tokens_per_second"]
    lines = [
        f"{results['machine']}, torch {results['torch']}, {results['dtype']}: memory is read at "
        f"{found['bandwidth_bytes_per_second'] / 1e9:.1f} GB/s, so at most {bound:.1f} tokens/s "
        f"for {found['weights_bytes'] / 1e6:.0f} MB of weights",
        "",
        f"| tokens/s | prompt of {', '.join(lengths)} tokens | decoding | of the bound | batch | batch / alone |",
        "|---|---|---|---|---|---|",
    ]
    for name in ("litmini", "transformers"):
        if name in found:
            prefill, decode, batch, *_ = found[name].values()
            rates = ", ".join(f"{rate:,.0f}" for rate in prefill.values())
            lines.append(
                f"| {name} | {rates} | {decode:.1f} | {decode / bound:.0%} | {batch:.1f} | {batch / decode:.1f} |"
            )
    lines += ["", f"from the command to the first token: {found['litmini']['seconds_to_first_token']:.1f} s"]
    return "\n".join(lines)
