"""OpenAI's request and response bodies."""

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from litmini.config.generate import SamplingConfig
from litmini.errors import UserError
from litmini.generation.prompts import check_messages, check_text, describe
from litmini.generation.request import Request
from litmini.generation.sampling import Logprobs
from litmini.templates.call_forms import parse_calls
from litmini.tokenizer import Message, Tokenizer

NEUTRAL: dict[str, Any] = {
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "functions": [],
    "response_format": {"type": "text"},
    "best_of": 1,
    "echo": False,
    "suffix": "",
    "modalities": ["text"],
}
"""Not implemented: accepted with these values, which change nothing, and refused with others."""
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
KNOWN = {
    *("tools", "tool_choice"),
    *("model", "messages", "prompt", "n", "stream", "stream_options", "max_tokens", "max_completion_tokens", "stop"),
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "logprobs", "top_logprobs", "ignore_eos"),
}


@dataclass(frozen=True)
class CompletionSettings:
    """The checked body of a request."""

    model: str
    prompts: list[str | list[Message] | list[int]]
    sampling: SamplingConfig
    n: int
    stream: bool
    usage: bool
    """Whether a stream ends with the number of tokens."""
    chat: bool
    tools: list[dict[str, Any]] = field(default_factory=list)
    """JSON schemas of the functions that the model may call."""


def read_request(
    body: Any, chat: bool, limit: int, defaults: Callable[[str], SamplingConfig] | None = None
) -> CompletionSettings:
    """Check a request body and return its settings.

    Args:
        limit: largest max_tokens, and the default.
        defaults: name of a model -> how it samples where the body does not say; None: greedy.

    Raises:
        UserError: a setting is unknown, not implemented or out of range; names it.
    """
    if not isinstance(body, dict):
        raise UserError("the body is not a JSON object.")
    body = {key: value for key, value in body.items() if value is not None}
    known = KNOWN - ({"prompt"} if chat else {"messages", "tools", "tool_choice"})  # those of the other endpoint
    if unknown := sorted(set(body) - known - IGNORED - set(NEUTRAL)):
        raise UserError(f"unknown settings: {', '.join(unknown)[:500]}; supported: {', '.join(sorted(known))}.")
    if unsupported := [f"{key} = {body[key]!r}"[:80] for key in NEUTRAL if key in body and body[key] != NEUTRAL[key]]:
        raise UserError(f"not implemented: {', '.join(unsupported)}.")
    kinds: dict[type, tuple[str, ...]] = {
        int: ("n", "max_tokens", "max_completion_tokens", "top_k", "seed", "top_logprobs"),
        float: ("temperature", "top_p", "min_p", "repetition_penalty"),
        bool: ("stream", "ignore_eos"),
        str: ("model",),
        dict: ("stream_options",),
    }
    for kind, keys in kinds.items():
        for key in keys:
            value = body.get(key)
            fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
            if key in body and (not fits or (isinstance(value, bool) and kind is not bool)):
                raise UserError(f"{key} is {value!r:.60}, expected {kind.__name__}.")
    n = body.get("n", 1)
    if not 1 <= n <= 16:
        raise UserError(f"n is {n}, expected 1 to 16.")
    max_tokens = body.get("max_completion_tokens", body.get("max_tokens", limit if chat else min(16, limit)))
    if max_tokens > limit:
        raise UserError(f"max_tokens is {max_tokens}, this server gives at most {limit}.")
    stop = body.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not (isinstance(stop, list) and len(stop) <= 16 and all(isinstance(s, str) for s in stop)):
        raise UserError("stop is no text or list of at most 16 texts.")
    options = {key: body[key] for key in ("top_k", "min_p", "repetition_penalty", "seed", "ignore_eos") if key in body}
    if "seed" in options:
        options["seed"] %= 2**63  # OpenAI's seeds may be negative
    options |= {key: body[key] for key in ("temperature", "top_p") if key in body}
    if options.get("top_p") == 1:
        options["top_p"] = None
    plain = defaults(body.get("model", "")) if defaults else SamplingConfig()
    logprobs = _logprobs(body, chat)
    sampling = replace(plain, max_new_tokens=max_tokens, stop=stop, logprobs=logprobs, **options)
    usage = bool(body.get("stream_options", {}).get("include_usage"))
    prompts = [check_messages(body.get("messages"))] if chat else _prompts(body.get("prompt"))
    stream, tools = body.get("stream", False), _tools(body)
    return CompletionSettings(body.get("model", ""), prompts, sampling, n, stream, usage, chat, tools)


def _tools(body: dict[str, Any]) -> list[dict[str, Any]]:
    if (chosen := body.get("tool_choice", "auto")) not in ("auto", "none"):
        raise UserError(f"not implemented: tool_choice = {chosen!r:.60}; expected auto or none.")
    tools = body.get("tools", [])
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError("tools is no list of objects.")
    return tools if chosen == "auto" else []


def _logprobs(body: dict[str, Any], chat: bool) -> int | None:
    wanted = body.get("logprobs", False if chat else None)
    if (chat and not isinstance(wanted, bool)) or (not chat and wanted is not None and type(wanted) is not int):
        raise UserError(f"logprobs is {wanted!r:.60}, expected {'bool' if chat else 'int'}.")
    if "top_logprobs" in body and not (chat and wanted):
        raise UserError("top_logprobs goes with logprobs: true, in chat completions.")
    return body.get("top_logprobs", 0) if chat and wanted else None if chat else wanted


ENTRY_BYTES = 200
"""What one log-probability takes, in memory or as JSON."""


def n_logprobs(settings: CompletionSettings, n_tokens: int) -> int:
    """Return how many log-probabilities so many tokens have."""
    return 0 if settings.sampling.logprobs is None else n_tokens * (1 + settings.sampling.logprobs)


def check_output(settings: CompletionSettings, prompts: list[list[int]], context: int, max_bytes: int) -> None:
    """Raise a UserError if the log-probabilities of a response that is sent as a whole may take more than allowed."""
    tokens = sum(min(settings.sampling.max_new_tokens, context - len(prompt)) for prompt in prompts) * settings.n
    if not settings.stream and n_logprobs(settings, tokens) * ENTRY_BYTES > max_bytes:
        raise UserError(
            f"{tokens} tokens with {n_logprobs(settings, tokens)} log-probabilities are more than {max_bytes // ENTRY_BYTES}, "
            f"which a response may have: ask for a stream, fewer choices, fewer tokens or fewer log-probabilities."
        )


def _prompts(value: Any) -> list[Any]:
    """Check texts or lists of token ids, one or several of either."""
    if isinstance(value, str):
        return [check_text(value)]
    if isinstance(value, list) and value and all(type(i) is int for i in value):
        return [value]
    if isinstance(value, list) and 0 < len(value) <= 64:
        if all(isinstance(text, str) for text in value):
            return [check_text(text) for text in value]
        if all(isinstance(ids, list) and ids and all(type(i) is int for i in ids) for ids in value):
            return value
    raise UserError("prompt is no text, list of token ids, or list of at most 64 of those.")


def encode(settings: CompletionSettings, tokenizer: Tokenizer) -> list[list[int]]:
    """Return the token ids of each prompt: messages by the template, text as it is.

    Raises:
        UserError: the template fails, or a token id is none of this tokenizer's.
    """
    encoded = []
    for prompt in settings.prompts:
        if settings.chat:
            encoded.append(tokenizer.encode_prompt(prompt, settings.tools or None))  # type: ignore[arg-type]
        elif isinstance(prompt, str):
            encoded.append(tokenizer.encode(prompt))
        else:
            size = tokenizer.fast.get_vocab_size()
            if any(not 0 <= token < size for token in prompt):  # type: ignore[operator]
                raise UserError(f"prompt has token ids outside 0..{size - 1}.")
            encoded.append(prompt)  # type: ignore[arg-type]
    return encoded


def choice(
    settings: CompletionSettings,
    index: int,
    piece: str,
    finish: str | None,
    logprobs: list[Logprobs],
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    """Return one choice of a response, or of a chunk of a stream: text, finish reason, and log-probabilities of its tokens."""
    named: dict[str, Any] | None = None
    if settings.sampling.logprobs is not None:
        tokens = [describe(token, tokenizer) for token in logprobs]
        offsets = [token.offset for token in logprobs]
        named = {"content": tokens, "refusal": None} if settings.chat else _old_logprobs(tokens, offsets)
    content, calls = parse_calls(piece, settings.tools) if settings.tools and finish == "stop" else (piece, [])
    common = {"index": index, "logprobs": named, "finish_reason": "tool_calls" if calls else finish}
    if not settings.chat:
        return {**common, "text": piece}
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        ids = [f"call_{uuid.uuid4().hex[:24]}" for _ in calls]
        numbered = [
            ({"index": i} if settings.stream else {}) | {"id": ids[i], "type": "function", "function": call}
            for i, call in enumerate(calls)
        ]
        message |= {"content": content or None, "tool_calls": numbered}
    return {**common, "delta" if settings.stream else "message": message}


def _old_logprobs(tokens: list[dict[str, Any]], offsets: list[int]) -> dict[str, Any]:
    """Return log-probabilities as the completions endpoint has them.

    Args:
        offsets: characters of the completion before each token.
    """
    return {
        "tokens": [_old_name(t) for t in tokens],
        "token_logprobs": [t["logprob"] for t in tokens],
        # with the token that was chosen, which may be none of the top ones
        "top_logprobs": [{_old_name(top): top["logprob"] for top in (*t["top_logprobs"], t)} for t in tokens],
        "text_offset": offsets,
    }


def _old_name(token: dict[str, Any]) -> str:
    """Return a token's text; for part of a character its bytes, such as `bytes:\\xf0\\x9f`."""
    whole = bytes(token["bytes"]) == token["token"].encode()
    return token["token"] if whole else f"bytes:{token['token']}"


def usage(prompts: list[list[int]], requests: list[Request]) -> dict[str, int]:
    """Count the tokens of prompts and completions."""
    read, written = sum(map(len, prompts)), sum(len(request.ids) for request in requests)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
