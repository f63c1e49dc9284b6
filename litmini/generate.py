"""Generation: prefill, decode, sampling, streaming. One engine for single prompts and ragged batches."""

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from litmini.cache import KVCache
from litmini.config import UserError
from litmini.loss import IGNORE
from litmini.tokenizer import Message, Tokenizer


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """One token id a row, (B,), from logits (B, vocab). Temperature 0 takes the most likely one."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is None and top_p is None:
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    ordered, index = logits.sort(descending=True, stable=True)  # equal logits stay in order, as in argmax
    if top_k is not None:
        ordered[:, top_k:] = float("-inf")
    if top_p is not None:  # the fewest tokens that together have at least top_p; always the first
        probabilities = ordered.softmax(-1)
        ordered = ordered.masked_fill(probabilities.cumsum(-1) - probabilities >= top_p, float("-inf"))
    chosen = torch.multinomial(ordered.softmax(-1), 1, generator=generator)  # (B, 1), places in that order
    return index.gather(1, chosen)[:, 0]


@torch.no_grad()  # not inference_mode: weights that FSDP gathers in it could not be trained on afterwards
def decode(
    model: nn.Module,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop_ids: list[int],
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> Iterator[list[int | None]]:
    """Yield, step by step, the next token id of every prompt: None for those that have stopped. Stop ids are not yielded.

    Args:
        prompts: token ids, of any lengths; shorter ones are padded on the left and do not see the padding.
        stop_ids: a row ends at any of these; an empty list: only at `max_new_tokens`.
        seed: of sampling; None: another each time.

    Raises:
        UserError: a setting is out of range, or a prompt is empty or leaves no room in the model's context.
    """
    _check(prompts, max_new_tokens, temperature, top_k, top_p)
    longest = max(len(p) for p in prompts)
    config: Any = model.config
    context: int = config.max_positions
    if longest >= context:
        raise UserError(f"the prompt has {longest} tokens, the model's context {context}: no room for an answer.")
    steps = min(max_new_tokens, context - longest)
    parameter = next(model.parameters())
    device = parameter.device
    generator = torch.Generator(device)
    generator.seed() if seed is None else generator.manual_seed(seed)
    cache = KVCache(config, len(prompts), longest + steps, parameter.dtype, device)
    tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)  # (B, T)
    lengths = torch.tensor([len(p) for p in prompts], device=device)[:, None]  # (B, 1)
    positions = torch.arange(longest, device=device) - (longest - lengths)  # (B, T), below 0: padding
    if longest > 1:  # fills the cache; no label is a target, so no logits are computed
        nothing = torch.full_like(tokens[:, :-1], IGNORE)
        model(tokens[:, :-1], positions[:, :-1], cache=cache, labels=nothing)
    current, running = tokens[:, -1:], [True] * len(prompts)
    for step in range(steps):
        logits = model(current, lengths - 1 + step, cache=cache)[:, -1]  # (B, vocab)
        chosen = sample(logits, temperature, top_k, top_p, generator)
        new: list[int | None] = []
        for row, token in enumerate(chosen.tolist()):  # CPU-GPU sync point
            running[row] = running[row] and token not in stop_ids
            new.append(token if running[row] else None)
        if not any(running):
            return
        yield new
        current = chosen[:, None]


def _check(
    prompts: list[list[int]], max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    problems = []
    if not prompts or not all(prompts):
        problems.append("the prompt is empty")
    if max_new_tokens < 1:
        problems.append(f"max_new_tokens is {max_new_tokens}, expected 1 or more")
    if not temperature >= 0:  # nan is neither
        problems.append(f"temperature is {temperature}, expected 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        problems.append(f"top_k is {top_k}, expected 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        problems.append(f"top_p is {top_p}, expected above 0 and at most 1")
    if problems:
        raise UserError("; ".join(problems) + ".")


def stream(model: nn.Module, tokenizer: Tokenizer, prompt: str | list[Message], **options: Any) -> Iterator[str]:
    """Pieces of the answer's text as they come; never half a character. Options are those of `decode`."""
    options.setdefault("stop_ids", tokenizer.stop_ids)
    ids: list[int] = []
    shown = ""
    for (token,) in decode(model, [tokenizer.encode_prompt(prompt)], **options):
        assert token is not None, "a batch of one yields only while it runs"
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # bytes of a character are still to come
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(ids)[len(shown) :]


def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt_or_messages: str | list[Message],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    ignore_eos: bool = False,
    return_tokens: bool = False,
) -> str | list[int]:
    """The answer to a prompt: its text, or its token ids.

    Args:
        prompt_or_messages: messages, or text, which is a user's turn where the checkpoint has a chat template.
        temperature: 0 is greedy.
        ignore_eos: go on to `max_new_tokens` whatever comes.
    """
    stops = [] if ignore_eos else tokenizer.stop_ids
    ids = [tokenizer.encode_prompt(prompt_or_messages)]
    (answer,) = generate_batch(model, ids, max_new_tokens, stops, temperature, top_k, top_p, seed)
    return answer if return_tokens else tokenizer.decode(answer)


def generate_batch(model: nn.Module, prompts: list[list[int]], *args: Any, **options: Any) -> list[list[int]]:
    """New token ids for each of several prompts; further arguments are those of `decode`."""
    answers: list[list[int]] = [[] for _ in prompts]
    for new in decode(model, prompts, *args, **options):
        for answer, token in zip(answers, new, strict=True):
            if token is not None:
                answer.append(token)
    return answers


class _Callable(ModuleType):
    """Importing this module puts it in the place of the function `litmini.generate`: so it can be called, too."""

    def __call__(self, *args: Any, **options: Any) -> str | list[int]:
        return generate(*args, **options)


sys.modules[__name__].__class__ = _Callable
