"""Prompts of users and programs: a text or messages, one or a file of them, checked before generation."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from litmini.config.generate import SamplingConfig
from litmini.errors import UserError
from litmini.files import existing_file
from litmini.generation.batch import check_prompt
from litmini.generation.generate import complete_all
from litmini.generation.request import Request
from litmini.generation.sampling import Logprobs
from litmini.generation.token_bytes import token_bytes, token_text
from litmini.templates.tool_calls import read_calls, read_objects
from litmini.tokenizer import ROLES, Message, Tokenizer


@dataclass(frozen=True)
class Prompt:
    """A line of a file of prompts."""

    line: int
    record: dict[str, Any]
    """The JSON of the line; empty where it is broken."""
    prompt: str | list[Message] | UserError
    """The prompt, or what is wrong with the line."""
    tools: list[dict[str, Any]] = field(default_factory=list)
    """JSON schemas of the functions that the model may call."""


def check_text(text: str) -> str:
    """Return `text`, unless it has a lone surrogate, which JSON escapes can hold and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("the prompt is not UTF-8 text.") from None
    return text


def check_messages(value: Any) -> list[Message]:
    """Return messages with a role and a text each; a content in parts, as OpenAI's clients send it, is joined.

    Raises:
        UserError: something else; says which message.
    """
    if not isinstance(value, list) or not value:
        raise UserError(f"messages is {_kind(value)}, expected a list with at least one message.")
    messages = []
    for number, turn in enumerate(value):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise UserError(f"messages[{number}] is {_kind(turn)}, expected an object with role and content.")
        if turn["role"] not in ROLES:
            raise UserError(f"messages[{number}].role is {turn['role']!r:.60}, expected one of {', '.join(ROLES)}.")
        content = turn.get("content")
        if isinstance(content, list):
            if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
                raise UserError(f"messages[{number}].content has a part that is no text.")
            content = "".join(part["text"] for part in content)
        try:
            calls = read_calls(turn.get("tool_calls"))
        except ValueError as error:
            raise UserError(f"messages[{number}]: {error}.") from None
        if content is None and calls:
            messages.append({key: value for key, value in turn.items() if key != "content"})
            continue
        if not isinstance(content, str):
            raise UserError(f"messages[{number}].content is {_kind(content)}, expected text.")
        messages.append({**turn, "content": check_text(content)})
    check_utf8(value)
    return messages


def check_utf8(value: Any) -> None:
    """Raise a UserError if a text anywhere in a JSON value, keys included, has a lone surrogate."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError("a text is not UTF-8: it has half of a surrogate pair.") from None
    except RecursionError:
        raise UserError("the JSON is nested too deeply.") from None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", type(None): "missing", bool: "a boolean"}
    return names.get(type(value), f"{value!r}"[:40])


def read_prompt(record: Any) -> str | list[Message]:
    """Return the `prompt` of a record, or its `messages`.

    Raises:
        UserError: it has neither, or both.
    """
    if not isinstance(record, dict):
        raise UserError(f"the record is {_kind(record)}, expected an object with prompt or messages.")
    if ("prompt" in record) == ("messages" in record):
        raise UserError(f"the record has the keys {', '.join(record) or 'none'}; expected either prompt or messages.")
    if "messages" in record:
        return check_messages(record["messages"])
    if not isinstance(record["prompt"], str):
        raise UserError(f"prompt is {_kind(record['prompt'])}, expected text.")
    return check_text(record["prompt"])


def read_prompts(path: str) -> Iterator[Prompt]:
    """The prompts of a JSONL file, one a line; a broken line is no end of it.

    Raises:
        UserError: there is no such file (at once, not at the first prompt).
    """
    return _read(existing_file(path, "file of prompts"))


def _read(path: Path) -> Iterator[Prompt]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            record: Any = {}
            tools: list[dict[str, Any]] = []
            try:
                record = json.loads(line.decode("utf-8-sig"))
                prompt: str | list[Message] | UserError = read_prompt(record)
                tools = read_objects(record.get("tools"), "tools")
            except UserError as error:
                prompt = error
            except (ValueError, RecursionError) as error:
                prompt = UserError(str(error) if isinstance(record, dict) and record else f"not valid JSON: {error}")
            yield Prompt(number, record if isinstance(record, dict) else {}, prompt, tools)


def complete_lines(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Iterable[Prompt],
    sampling: SamplingConfig,
    batch_size: int,
    system: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the completions of `prompts` in their order, `batch_size` of them generated together.

    Each is the record with `line`, `answer`, `finish_reason` ("stop" or "length"), `n_tokens` and, if requested,
    `logprobs`; or with `line` and `error`. With a seed, each line has one of its own.
    """
    part: list[tuple[Prompt, Request | UserError]] = []
    for prompt in tqdm(prompts, desc="generating", unit="line", disable=None):
        part.append((prompt, _request(model, tokenizer, prompt, sampling, system)))
        if len(part) == batch_size:
            yield from _complete(model, tokenizer, part)
            part = []
    yield from _complete(model, tokenizer, part)


def _request(
    model: nn.Module, tokenizer: Tokenizer, prompt: Prompt, sampling: SamplingConfig, system: str | None
) -> Request | UserError:
    content, config = prompt.prompt, model.config
    if isinstance(content, UserError):
        return content
    if system is not None:
        content = [{"role": "user", "content": content}] if isinstance(content, str) else content
        content = [{"role": "system", "content": system}, *content]
    try:
        ids = tokenizer.encode_prompt(content, prompt.tools or None)
        check_prompt(ids, config.max_positions, config.vocab_size)  # type: ignore[union-attr,arg-type]
    except UserError as error:
        return error
    if sampling.seed is not None:
        sampling = replace(sampling, seed=(sampling.seed + prompt.line) % 2**63)
    return Request(ids, sampling, tokenizer.stop_ids, tokenizer)


def _complete(
    model: nn.Module, tokenizer: Tokenizer, part: list[tuple[Prompt, Request | UserError]]
) -> Iterator[dict[str, Any]]:
    if requests := [request for _, request in part if isinstance(request, Request)]:
        complete_all(model, requests)
    for prompt, request in part:
        result: dict[str, Any] = {**prompt.record, "line": prompt.line}
        error = request if isinstance(request, UserError) else request.error
        if isinstance(error, UserError):
            yield {**result, "error": str(error)}
            continue
        if error is not None:
            raise error
        assert isinstance(request, Request), "checked above"
        result |= {"answer": request.text, "finish_reason": request.finish, "n_tokens": len(request.ids)}
        if request.logprobs:
            result["logprobs"] = [describe(token, tokenizer) for token in request.logprobs]
        yield result


def describe(token: Logprobs, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the log-probabilities of one token as OpenAI's API has them."""
    top = [_named(tokenizer, i, value) for i, value in token.top]
    return {**_named(tokenizer, token.token, token.logprob), "top_logprobs": top}


def _named(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    content = token_bytes(tokenizer, token)
    # OpenAI's value for a token that cannot be; JSON has no infinity
    return {"token": token_text(content), "logprob": max(logprob, -9999.0), "bytes": list(content)}
