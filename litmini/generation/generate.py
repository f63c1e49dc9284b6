"""Generation for one prompt or several, as text, token ids or a stream."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from litmini.checkpoints.load import load
from litmini.checkpoints.scores import gives_scores, refuse_scores
from litmini.config.generate import ModelConfig, SamplingConfig
from litmini.errors import UserError
from litmini.generation.batch import Batch
from litmini.generation.request import Request
from litmini.generation.speculative import Draft
from litmini.models import use_model_file
from litmini.tokenizer import Message, Tokenizer


def usable_device(choice: str) -> str:
    """Return the device that `--device` names.

    Raises:
        UserError: it cannot be used here.
    """
    device = choice if choice != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()  # one without values, such as meta, has no item
        torch.Generator(device)
    except (RuntimeError, AssertionError, ImportError) as error:  # torch raises any of them
        raise UserError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def open_model(config: ModelConfig) -> tuple[nn.Module, Tokenizer]:
    """Load the model and tokenizer that a command names.

    Raises:
        UserError: as `litmini.load`, or the device cannot be used here.
    """
    if config.compile and config.bits == 4:
        raise UserError("--compile is for weights in 16 or 32 bits, not for --bits 4.")
    refuse_scores(config.checkpoint_dir, config.adapter_dir)
    device = usable_device(config.device)
    use_model_file(config.model_file)
    model, tokenizer = load(
        config.checkpoint_dir, config.adapter_dir, config.dtype, device, config.bits, config.check_finite
    )
    if config.compile:
        from litmini.generation.compile import compile_decoding

        compile_decoding(model)
    if config.chat_template != "auto" or config.template_kwargs is not None:
        tokenizer = Tokenizer(tokenizer.directory, config.chat_template, template_kwargs=config.template_kwargs)
    tokenizer.special_tokens_in_text = config.special_tokens_in_text
    return model, tokenizer


def finish_all(model: nn.Module, requests: list[Request]) -> None:
    """Generate all requests to their ends in one batch.

    Raises:
        Exception: a request failed; the others are complete.
    """
    complete_all(model, requests)
    raise_first(requests)


def complete_all(model: nn.Module, requests: list[Request]) -> None:
    """Generate all requests to their ends in one batch; one that fails has its `error` set."""
    batch = Batch(model)
    batch.add(requests)
    while batch.requests:
        with _native_gemv(batch):
            batch.step()


def raise_first(requests: list[Request]) -> None:
    """Raise the error of the first request that failed, if one did."""
    if error := next((request.error for request in requests if request.error is not None), None):
        raise error


@contextlib.contextmanager
def _native_gemv(batch: Batch) -> Iterator[None]:
    """For one token in bf16 on a CPU: torch's own matrix-vector product, twice as fast as oneDNN's.

    The switch is the process's. So it is for callers that decode in one thread; the server, with threads, does without.
    """
    one = len(batch.requests) == 1 and batch.draft is None and batch.device.type == "cpu"
    before = torch.backends.mkldnn.enabled
    if one and batch.dtype == torch.bfloat16:
        torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


def stream_text(model: nn.Module, request: Request, draft: Draft | None = None) -> Iterator[str]:
    """Yield pieces of the text of one request as they come."""
    batch = Batch(model, draft)
    batch.add([request])
    while True:
        if piece := request.take():
            yield piece
        if not batch.requests:
            break
        with _native_gemv(batch):
            batch.step()
    raise_first([request])


Prompt = str | list[Message]


def stream(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt_or_messages: Prompt,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    ignore_eos: bool = False,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    tools: list[dict[str, Any]] | None = None,
) -> Iterator[str]:
    """Yield the completion of a prompt in pieces of text, as they come. Arguments and errors are those of `generate`."""
    sampling = SamplingConfig(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=_texts(stop),
        seed=seed,
        ignore_eos=ignore_eos,
    )
    _check_generates(model)
    yield from stream_text(
        model, Request(tokenizer.encode_prompt(prompt_or_messages, tools), sampling, tokenizer.stop_ids, tokenizer)
    )


def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt_or_messages: Prompt | list[Prompt],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    ignore_eos: bool = False,
    return_tokens: bool = False,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    batch_size: int = 16,
    tools: list[dict[str, Any]] | None = None,
) -> str | list[int] | list[str] | list[list[int]]:
    """Return the completion of a prompt, or of each of a list of prompts, which run in batches; `stream` yields pieces.

    Args:
        model, tokenizer: as `litmini.load` returns them.
        prompt_or_messages: a text, which is a user's turn where the checkpoint has a chat template; or messages, each a
            dictionary with role and content; or a list of such prompts.
        max_new_tokens: longest completion in tokens.
        temperature: 0 is greedy; 1 samples from the model's own distribution.
        top_k: sample from so many most probable tokens.
        top_p: sample from the most probable tokens whose probabilities add up to this value.
        min_p: sample from tokens at least so many times as probable as the most probable one.
        repetition_penalty: above 1, tokens that have occurred become less probable (arXiv 1909.05858).
        stop: texts that end the completion and are no part of it.
        seed: for repeatable completions; each prompt of a list has the next one.
        ignore_eos: do not stop before `max_new_tokens`.
        return_tokens: return token ids, end token included, instead of text.
        batch_size: prompts of a list in one batch.
        tools: JSON schemas of functions, for templates that take them.

    Returns:
        The text or, for a list of prompts, the list of texts in their order; with `return_tokens`, lists of ids.

    Raises:
        UserError: a setting is out of range, or a prompt is empty or fills the model's context.
    """
    _check_generates(model)
    given: Any = prompt_or_messages
    several = isinstance(given, list) and not (given and isinstance(given[0], dict))
    prompts = list(given) if several else [given]
    sampling = SamplingConfig(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=_texts(stop),
        seed=seed,
        ignore_eos=ignore_eos,
    )
    requests = []
    for number, each in enumerate(prompts):
        own = sampling if seed is None else replace(sampling, seed=(seed + number) % 2**63)
        requests.append(Request(tokenizer.encode_prompt(each, tools), own, tokenizer.stop_ids, tokenizer))
    for start in range(0, len(requests), max(1, batch_size)):
        finish_all(model, requests[start : start + max(1, batch_size)])
    found: list[Any] = [request.ids if return_tokens else request.text for request in requests]
    return found if several else found[0]


def _check_generates(model: nn.Module) -> None:
    """Raise a `UserError` for a model that gives scores."""
    if gives_scores(model):
        raise UserError("this model is a classifier or a reward model: it gives scores, so it generates nothing.")


def _texts(stop: Sequence[str]) -> list[str]:
    return [stop] if isinstance(stop, str) else list(stop)
