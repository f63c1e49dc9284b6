"""Turns of a record -> messages as chat templates have them."""

from typing import Any

from litmini.data.readers import check_text, parse_json
from litmini.templates.tool_calls import read_calls
from litmini.tokenizer import ROLES, Message

ROLE_NAMES = {
    **dict.fromkeys(("gpt", "model", "chatgpt", "bing", "bard", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "function_response"), "tool"),
    "human": "user",
}
"""Other names of roles, ShareGPT's."""
TRAIN = ("weight", "train", "training", "loss")
"""Keys with which data say whether a turn is trained."""
TURN_KEYS = {"role", "from", "content", "value", *TRAIN}
UNUSED = {
    "functions": "give them as tools",
    "developer": "give it as a turn",
    "documents": "put their texts into a turn",
    "chat_template_kwargs": "give them as --data.template_kwargs",
    **dict.fromkeys(("images", "image", "videos", "audios", "audio"), "only text is trained"),
}
"""Keys of a conversation, or of a turn, that change what it means -> what to do instead."""


def read_messages(turns: Any) -> tuple[list[Message], list[int]]:
    """Return messages, and the numbers of assistant turns that are not to be trained.

    Raises:
        ValueError: a turn is not one, has an unknown role, or something that is not read.
    """
    if isinstance(turns, str):  # a CSV cell
        turns = parse_json(turns)
        if isinstance(turns, ValueError):
            raise turns
    if not isinstance(turns, list) or not turns:
        raise ValueError("expected a list of turns, with at least one")
    messages: list[Message] = []
    untrained = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise ValueError(f"a turn is {type(turn).__name__}, expected role and content")
        role = turn.get("role", turn.get("from"))
        is_call = role == "function_call"
        role = ROLE_NAMES.get(role, role) if isinstance(role, str) else role
        if role not in ROLES:
            raise ValueError(f"role {role!r}; expected one of {', '.join(ROLES)}")
        if turn.get("function_call"):
            raise ValueError("a turn has function_call, which is not read; expected tool_calls")
        if unused := [key for key in UNUSED if turn.get(key)]:
            raise ValueError(f"a {role} turn has {unused[0]}, which is not read: {UNUSED[unused[0]]}")
        if not _is_trained(turn, role):
            untrained.append(len(messages))
        rest = {k: v for k, v in turn.items() if k not in TURN_KEYS and v is not None}
        content = turn.get("content", turn.get("value"))
        if is_call:  # its value is a call, or a list of them
            value = parse_json(content) if isinstance(content, str) else content
            rest["tool_calls"], content = [value] if isinstance(value, dict) else value, None
        calls = rest["tool_calls"] = read_calls(rest.get("tool_calls"))
        if is_call and not calls:
            raise ValueError("a function_call turn has no call; expected an object with name and arguments")
        if not calls:
            del rest["tool_calls"]
        elif role != "assistant":
            raise ValueError(f"a {role} turn has tool_calls; expected them in assistant turns")
        if content is not None or not calls:
            rest = {"content": _text(content, role), **rest}
        messages.append({"role": role, **rest})
    return messages, untrained


def _text(content: Any, role: str) -> str:
    """Return the content of a turn, which may be a list of parts that are text."""
    if isinstance(content, list):
        parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
        kinds = [part.get("type", "text") if isinstance(part, dict) else type(part).__name__ for part in parts]
        if others := [kind for kind in kinds if kind != "text"]:
            raise ValueError(
                f"content of a {role} turn is a list with a part of type {others[0]}; only text is trained"
            )
        text_of = f"content of a {role} turn is a list, in which a text"
        return "".join(check_text(part.get("text"), text_of) for part in parts)
    return check_text(content, f"content of a {role} turn")


def _is_trained(turn: dict[str, Any], role: str) -> bool:
    """Return whether a turn is trained, which the keys of `TRAIN` say of it."""
    given = {key: turn[key] for key in TRAIN if turn.get(key) is not None}
    wrong = [key for key, value in given.items() if value not in (0, 1)]
    if wrong or len(set(given.values())) > 1:
        raise ValueError(f"a {role} turn has {given}; expected 0 or 1, or false or true, and the same in all of them")
    if role != "assistant" and any(given.values()):
        raise ValueError(f"a {role} turn has {given}; only assistant turns are trained: leave it out, or set it to 0")
    return all(given.values())
