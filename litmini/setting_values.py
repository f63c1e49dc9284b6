"""Values of settings, read from YAML nodes by the type of the setting.

YAML's own guesses are not used: `1:30` is 90 to it, `yes` a truth value and `2026-11-29` a date. Here the type decides what is
read, so text is text as it was typed.
"""

import math
import re
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml

from litmini.errors import UserError

Text = Annotated[str, "as typed"]
"""Text that people write, such as a prompt: on the command line, null is the word. Elsewhere `--name null` is none."""
MAX_VALUES = 100_000  # in a file; aliases can repeat values without end
NULLS = ("null", "Null", "NULL", "~", "")
SWITCH = {word: word in ("true", "yes", "on") for word in ("true", "false", "yes", "no", "on", "off")}
NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?")


class Unknown(UserError):
    """A name that is no setting."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def describe(kind: Any) -> str:
    """Return a type in words."""
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(describe(part) for part in get_args(kind))
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false", NoneType: "null"}
    words |= {dict[str, int]: "names and numbers such as '{q_proj: 8}'", dict[str, float]: "such as '{q_proj: 8.0}'"}
    words |= {list[str]: "a list such as '[a, b]'", tuple[float, float]: "two numbers such as '[0.9, 0.95]'"}
    words |= {Text: "text", list[float]: "a list of numbers such as '[1.0, 2.0]'"}
    return words.get(kind) or str(kind)


def parts_of(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


class Reader:
    """Reads the values of YAML nodes by type."""

    def __init__(self, types: dict[str, Any], path: str) -> None:
        self.types = types
        self.path = path
        self.lines: dict[str, int] = {}  # of settings
        self.values = 0

    def group(self, node: yaml.MappingNode, prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for (key, line), value in self._pairs(node, prefix).items():
            name = prefix + key
            if name not in self.types and any(known.startswith(f"{name}.") for known in self.types):
                if not isinstance(value, yaml.MappingNode):
                    inside = [known for known in self.types if known.startswith(f"{name}.")]
                    raise UserError(f"{name} is a group of settings, expected {', '.join(inside)}.")
                found |= self.group(value, f"{name}.")
            else:
                found |= self.setting(name, value)
                if self.lines.setdefault(name, line) != line:  # once as lora.rank, once within lora
                    raise UserError(self._twice(name, self.lines[name], line))
        return found

    def setting(self, name: str, node: yaml.Node, word: str | None = None) -> dict[str, Any]:
        """Return a setting, or an entry of one that is a mapping, with its value; `word` is what was typed for it."""
        kind = self.types.get(name)
        if kind is None:
            parts = parts_of(self.types.get(name.rpartition(".")[0]))
            kind = next((get_args(part)[1] for part in parts if get_origin(part) is dict), None)
            if kind is None:
                first = node.value[0][0].value if isinstance(node, yaml.MappingNode) and node.value else None
                raise Unknown(f"{name}.{first}" if first else name)
        typed = _source(node) if word is None else word
        typed = typed if len(typed) <= 60 else f"{typed[:57]}..."
        try:
            return {name: self.value(node, kind, name)}
        except OverflowError:
            raise UserError(f"out of range: {name} is {typed}. See --help.") from None
        except ValueError as error:
            raise UserError(f"{name} is {typed or 'empty'}; expected {str(error) or describe(kind)}.") from None

    def value(self, node: yaml.Node, kind: Any, name: str) -> Any:
        """Return a node's value of a type; raise ValueError if it is of another, with what is expected if that is special."""
        self._count()
        if node.tag.startswith("!") or "python" in node.tag:
            raise UserError(f"{name} has the YAML tag {node.tag}, expected none.")
        parts = parts_of(kind)
        if NoneType in parts and _is_null(node):
            return None
        special = ""
        for part in sorted(
            (p for p in parts if p is not NoneType), key=(str, Text).count
        ):  # text takes everything: last
            try:
                return self._one(node, part, name)
            except ValueError as error:
                special = special or str(error)
        raise ValueError(special)

    def _one(self, node: yaml.Node, kind: Any, name: str) -> Any:
        origin, inside = get_origin(kind), get_args(kind)
        if kind is Any:
            return self._any(node, name)
        if origin is dict and isinstance(node, yaml.MappingNode):
            pairs = self._pairs(node, f"{name}.").items()
            return {key: self.value(value, inside[1], name) for (key, _), value in pairs}
        if origin in (list, tuple) and isinstance(node, yaml.SequenceNode):
            if origin is tuple and len(inside) != len(node.value):
                raise ValueError
            kinds = inside if origin is tuple else inside * len(node.value)
            return origin(self.value(value, kind, name) for value, kind in zip(node.value, kinds, strict=True))
        if not isinstance(node, yaml.ScalarNode) or origin in (dict, list, tuple):
            raise ValueError
        if origin is Literal:
            if matches := [one for one in inside if str(one) == node.value]:
                return matches[0]
            raise ValueError
        if kind in (str, Text) and _is_null(node) and node.value and self.path:
            raise ValueError
        return SCALARS[kind](node.value if node.style is None else _whole_characters(node.value))

    def _any(self, node: yaml.Node, name: str) -> Any:
        """Return a value whose form decides its type."""
        if isinstance(node, yaml.MappingNode):
            return self.value(node, dict[str, Any], name)
        if isinstance(node, yaml.SequenceNode):
            return self.value(node, list[Any], name)
        is_plain = isinstance(node, yaml.ScalarNode) and node.style is None
        return self.value(node, None | bool | int | float | str if is_plain else str, name)

    def _pairs(self, node: yaml.MappingNode, prefix: str) -> dict[tuple[str, int], yaml.Node]:
        """Return the entries of a mapping by key and line, with those of `<<` that it does not have itself.

        Raises:
            UserError: a key stands twice.
        """
        own: dict[str, tuple[int, yaml.Node]] = {}
        merged: dict[str, tuple[int, yaml.Node]] = {}
        for key, value in node.value:
            self._count()
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise UserError(f"{self.path}: a key in line {line} is no text.")
            if key.tag == "tag:yaml.org,2002:merge":
                for one in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if isinstance(one, yaml.MappingNode):
                        more = {inner: (at, entry) for (inner, at), entry in self._pairs(one, prefix).items()}
                        merged = {**more, **merged}
            elif (name := key.value if key.style is None else _whole_characters(key.value)) in own:
                raise UserError(self._twice(prefix + name, own[name][0], line))
            else:
                own[name] = line, value
        return {(name, at): entry for name, (at, entry) in {**merged, **own}.items()}

    def _count(self) -> None:
        self.values += 1
        if self.values > MAX_VALUES:
            raise UserError(f"{self.path or 'a setting'} holds more than {MAX_VALUES:,} values, aliases included.")

    def _twice(self, name: str, first: int, second: int) -> str:
        lines = f"line {first}" if first == second else f"lines {first} and {second}"
        return f"{name} stands twice{f' in {self.path}, {lines}' if self.path else ''}; expected once: delete one."


def _source(node: yaml.Node) -> str:
    """Return what was typed for a node."""
    if isinstance(node, yaml.ScalarNode):
        return str(node.value)
    buffer = node.start_mark.buffer
    return buffer[node.start_mark.pointer : node.end_mark.pointer] if buffer else "of another kind"


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value in NULLS


def _whole_characters(text: str) -> str:
    """Return quoted text with pairs of escapes, as JSON writes characters beyond 16 bits, joined."""
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise ValueError("whole characters (a \\ud800 to \\udfff escape stands alone)") from None


def _int(text: str) -> int:
    if not re.fullmatch(r"[-+]?\d[\d_]*", text):
        raise ValueError
    if len(text) > 40 or not -(2**63) <= int(text) < 2**63:
        raise OverflowError
    return int(text)


def _float(text: str) -> float:
    if not NUMBER.fullmatch(text):
        raise ValueError
    value = float(text.replace("_", ""))
    if math.isinf(value):
        raise ValueError("a finite number")
    return value


def _bool(text: str) -> bool:
    if text.lower() not in SWITCH:
        raise ValueError
    return SWITCH[text.lower()]


SCALARS: dict[Any, Callable[[str], Any]] = {str: str, Text: str, int: _int, float: _float, bool: _bool}
