"""Values of settings from YAML: the type of a setting decides what a word is, so text is text as it was typed.

What stands twice, or has no end, is an error.
"""

import math
import re
from collections.abc import Iterator
from itertools import islice
from types import NoneType
from typing import Any

import yaml

from litmini.errors import UserError

MAX_VALUES = 100_000  # in a file; aliases can repeat values without end
NULLS = ("null", "Null", "NULL", "~", "")
SWITCH = {word: word in ("true", "yes", "on") for word in ("true", "false", "yes", "no", "on", "off")}
WHOLE = re.compile(r"[-+]?\d[\d_]*")
NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?")


def compose(text: str, path: str) -> yaml.Node | None:
    """Return the node of a YAML text; raise UserError if aliases make it too large."""
    node = yaml.compose(text, yaml.SafeLoader)
    if node and sum(1 for _ in islice(_expanded(node), MAX_VALUES + 1)) > MAX_VALUES:
        raise UserError(f"{path or 'a setting'} holds more than {MAX_VALUES:,} values, aliases included.")
    return node


def _expanded(node: yaml.Node) -> Iterator[yaml.Node]:
    """Yield a node and all within it, those that aliases repeat each time."""
    yield node
    for one in node.value if isinstance(node, yaml.CollectionNode) else ():
        for inner in one if isinstance(one, tuple) else (one,):
            yield from _expanded(inner)


def pairs_of(node: yaml.MappingNode, prefix: str, path: str) -> dict[str, tuple[int, yaml.Node]]:
    """Return key -> line and value of the entries of a mapping, with those of `<<` that it does not have itself.

    Raises:
        UserError: a key stands twice.
    """
    own: dict[str, tuple[int, yaml.Node]] = {}
    merged: dict[str, tuple[int, yaml.Node]] = {}
    first_merge = 0
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{path or prefix.removesuffix(chr(46))}: a key in line {line} is no text.")
        if key.tag == "tag:yaml.org,2002:merge":
            if first_merge:
                raise stands_twice(prefix + key.value, path, first_merge, line)
            first_merge = line
            for one in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if not isinstance(one, yaml.MappingNode):
                    raise UserError(
                        f"{prefix}<< is {shortened(source_of(one))}; expected a group of settings, or a list of them."
                    )
                merged = {**pairs_of(one, prefix, path), **merged}
        elif (name := key.value if key.style is None else _whole_characters(key.value)) in own:
            raise stands_twice(prefix + name, path, own[name][0], line)
        else:
            own[name] = line, value
    return {**merged, **own}


def value_of(node: yaml.Node, takes: set[Any], name: str, path: str) -> Any:
    """Return the value of a node, where numbers, switches and none are only in settings that take them."""
    if node.tag.startswith("!") or "python" in node.tag:
        raise UserError(f"{name} has the YAML tag {node.tag}, expected none.")
    if isinstance(node, yaml.MappingNode):
        return {key: value_of(value, takes, name, path) for key, (_, value) in pairs_of(node, f"{name}.", path).items()}
    if isinstance(node, yaml.SequenceNode):
        return [value_of(one, takes, name, path) for one in node.value]
    text, is_plain = node.value, node.style is None
    is_any = Any in takes and is_plain
    choices = {str(one): one for one in takes if isinstance(one, (str, int))}
    if is_plain and text in NULLS and takes & {NoneType, Any}:
        return None
    if is_plain and text in NULLS[:-1] and str in takes:
        raise ValueError
    if text in choices:
        return choices[text]
    if (bool in takes or is_any) and text.lower() in SWITCH:
        return SWITCH[text.lower()]
    if (takes & {int, float} or is_any) and NUMBER.fullmatch(text):
        return _number(text, takes)
    if not takes & {str, Any}:
        raise ValueError
    return text if node.tag == "typed" or is_plain else _whole_characters(text)


def _number(text: str, takes: set[Any]) -> int | float:
    if WHOLE.fullmatch(text) and float not in takes:
        if len(text) > 40 or not -(2**63) <= int(text) < 2**63:
            raise OverflowError
        return int(text)
    value = float(text.replace("_", ""))
    if math.isinf(value):
        raise ValueError("a finite number")
    return value


def source_of(node: yaml.Node) -> str:
    """Return what was typed for a node of a file."""
    if isinstance(node, yaml.ScalarNode):
        return str(node.value)
    return str(node.start_mark.buffer or "")[node.start_mark.pointer : node.end_mark.pointer] or "of another kind"


def _whole_characters(text: str) -> str:
    """Return quoted text with pairs of escapes, as JSON writes characters beyond 16 bits, joined."""
    if "\0" in text:  # no word of a command line and no path has it
        raise ValueError("text without \\0")
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise ValueError("whole characters (a \\ud800 to \\udfff escape stands alone)") from None


def stands_twice(name: str, path: str, first: int, second: int) -> UserError:
    lines = f"line {first}" if first == second else f"lines {first} and {second}"
    return UserError(f"{name} stands twice{f' in {path}, {lines}' if path else ''}; expected once: delete one.")


def shortened(text: str) -> str:
    """Return a text, or the beginning of a long one."""
    return text if len(text) <= 60 else f"{text[:57]}..."
