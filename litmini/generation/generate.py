"""Generation for one prompt or several, as text, token ids or a stream."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from litmini.checkpoints.load import load
from litmini.checkpoints.scores import refuse_scores
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


def stream(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str | list[Message],
    sampling: SamplingConfig | None = None,
    draft: Draft | None = None,
) -> Iterator[str]:
    """Yield pieces of the completion's text as they come."""
    request = Request(tokenizer.encode_prompt(prompt), sampling or SamplingConfig(), tokenizer.stop_ids, tokenizer)
    yield from stream_text(model, request, draft)


def stream_text(model: nn.Module, request: Request, draft: Draft | None = None) -> Iterator[str]:
    """Yield pieces of the text of one request as they come."""
    batch = Batch(model, draft)
    batch.add([request])
    while batch.requests:
        with _native_gemv(batch):
            batch.step()
        if piece := request.take():
            yield piece
    raise_first([request])


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
    """Return the completion of a prompt: its text, or its token ids.

    Args:
        prompt_or_messages: messages, or text, which is a user's turn where the checkpoint has a chat template.
        temperature: 0 is greedy.
        ignore_eos: do not stop before `max_new_tokens`.

    Raises:
        UserError: a setting is out of range, or the prompt is empty or fills the model's context.
    """
    sampling = SamplingConfig(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        ignore_eos=ignore_eos,
    )
    request = Request(tokenizer.encode_prompt(prompt_or_messages), sampling, tokenizer.stop_ids)
    finish_all(model, [request])
    return request.ids if return_tokens else tokenizer.decode(request.ids)
