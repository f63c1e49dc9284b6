"""Settings: reads them from YAML files and from words of a command line, and makes a dataclass of them.

jsonargparse has the defaults, checks types and prints the help. It gets values, not words, which it would read as YAML 1.1:
`1:30` is 90 there, `yes` a truth value and `# Rules` nothing (`yaml_values.py`).
"""

import dataclasses
import json
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import jsonargparse
import yaml

from litmini.errors import UserError
from litmini.files import existing_file
from litmini.yaml_values import NULLS, compose, pairs_of, shortened, source_of, stands_twice, value_of

Text = Annotated[str, "as typed"]
"""Text that people write, such as a prompt: on the command line, null is the word. Elsewhere `--name null` is none."""


def types_of(config_class: type, prefix: str = "") -> dict[str, Any]:
    """Return dotted name -> type of all settings in a dataclass and its groups, which are dataclasses too."""
    found: dict[str, Any] = {}
    hints = get_type_hints(config_class, include_extras=True)
    for field in dataclasses.fields(config_class):
        group = group_of(hints[field.name])
        found |= types_of(group, f"{prefix}{field.name}.") if group else {prefix + field.name: hints[field.name]}
    return found


def group_of(kind: Any) -> type | None:
    """Return the dataclass of a group of settings, which may be null; None: the type is that of a setting."""
    parts = [part for part in (get_args(kind) or (kind,)) if part is not NoneType]
    return parts[0] if len(parts) == 1 and dataclasses.is_dataclass(parts[0]) else None  # type: ignore[return-value]


def forms(kind: Any) -> set[Any]:
    """Return what values of a type are made of, such as {list, str, NoneType} or {"auto", bool}; keys of mappings are text."""
    origin, inside = get_origin(kind), get_args(kind)
    if kind == Text:
        return {Text, str}
    if origin is Literal:
        return set(inside)
    own = {origin or kind} - {Union, UnionType}
    return own.union(*map(forms, inside[1:] if origin is dict else inside))


def describe(kind: Any) -> str:
    """Return a type in words."""
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(describe(part) for part in get_args(kind))
    if get_origin(kind) is list and get_origin(get_args(kind)[0]) is Literal:
        return f"a list of {describe(get_args(kind)[0])}, such as '[{get_args(get_args(kind)[0])[0]}]'"
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false", NoneType: "null"}
    words |= {dict[str, int]: "names and numbers such as '{q_proj: 8}'", dict[str, float]: "such as '{q_proj: 8.0}'"}
    words |= {list[str]: "a list such as '[a, b]'", tuple[float, float]: "two numbers such as '[0.9, 0.95]'"}
    words |= {dict[str, Any]: "names and values such as '{enable_thinking: false}'"}
    words |= {dict[str, list[Any]]: "names and lists of values such as '{optim.lr: [1e-4, 3e-4]}'"}
    words |= {dict[str, list[float]]: "names and lists of numbers such as '{lora: [1e-4, 3e-4]}'"}
    words |= {
        dict[str, str]: "names and texts such as '{mine: out/NAME/final}'",
        list[int]: "a list of whole numbers such as '[0, 1]'",
    }
    words |= {Text: "text", list[float]: "a list of numbers such as '[1.0, 2.0]'"}
    return words.get(kind) or str(kind)


class Settings:
    """Settings by dotted name, read one after the other; later ones replace earlier ones."""

    def __init__(self, config_class: type) -> None:
        self.config_class = config_class
        self.parser = _parser_of(config_class)
        self.types = types_of(config_class)
        self.values: dict[str, Any] = {}
        self.left_out: set[str] = set()  # groups that are null
        self.unknown: list[str] = []

    def add_file(self, path: str, prefix: str = "") -> None:
        """Add those of a YAML file, which holds one group if there is a prefix.

        Raises:
            UserError: the file is missing or no YAML, a setting stands twice or has another type.
        """
        try:
            text = existing_file(path, "config file").read_text(encoding="utf-8-sig")
            node = compose(text, path)
            if not isinstance(node, yaml.MappingNode):
                raise UserError(f"{path} holds no settings; expected lines such as out_dir: out/NAME")
            self._add_group(node, prefix, path)
        except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
            raise UserError(f"{path} is not valid YAML: {error}") from None
        except RecursionError:
            raise UserError(f"{path} is nested too deeply, or an alias holds itself.") from None

    def add_word(self, name: str, word: str) -> None:
        """Add a setting, an entry of one, or a group, as `--name word` gives it."""
        kind = self._kind(name)
        takes = forms(kind)
        inside = [key for key in self.types if key.startswith(f"{name}.")]
        node = None
        if word.lstrip()[:1] in ("[", "{"):  # else text as it was typed, with # and quotes
            with suppress(yaml.YAMLError, RecursionError):
                node = compose(word, "")
        wanted = {Any, dict} if isinstance(node, yaml.MappingNode) else {Any, list, tuple}
        if isinstance(node, yaml.MappingNode) and inside:
            self._add_group(node, f"{name}.", "")
        elif node and (kind is None or takes & wanted):
            self._add(name, node, "", word)
        elif inside and Path(word).is_file():
            self.add_file(word, f"{name}.")
        else:
            is_text = str in takes and (word != "null" or NoneType not in takes or Text in takes)
            self._add(name, yaml.ScalarNode("typed", word, style='"' if is_text else None), "", word)

    def put(self, setting: str, value: Any) -> None:
        """Set a value; raise TypeError if it is of another type."""
        checked = _without_text(value, self.types[setting])
        self.parser.validate(jsonargparse.Namespace({setting: checked}), skip_required=True)
        self.values[setting] = value

    def build(self) -> Any:
        """Return the dataclass with these values, and the defaults of all others.

        Raises:
            UserError: values are missing or out of range.
        """
        checked = {name: _without_text(value, self.types[name]) for name, value in self.values.items()}
        try:
            settings = self.parser.parse_object(checked)
        except ArgumentError as error:
            names = str(error).rpartition("required: ")[2].split(", ")
            raise UserError(f"missing: {', '.join(f'--{name}' for name in names)}. See --help.") from None
        for name, value in self.values.items():
            if checked[name] is not value:
                settings[name] = value
        for name in self.left_out:
            settings[name] = None
        return _made(self.config_class, settings)

    def print_help(self, doc: str) -> None:
        """Print all settings with their docstrings, after that of a script."""
        self.parser.description = doc
        self.parser.print_help()

    def as_yaml(self) -> str:
        """Return all settings, given or default, as a config file."""
        settings = self.parser.get_defaults()
        del settings["config"]
        for name, value in [*self.values.items(), *((group, None) for group in self.left_out)]:
            settings[name] = value
        return yaml.safe_dump(json.loads(json.dumps(settings.as_dict())), sort_keys=False, allow_unicode=True)

    def _add_group(self, group: yaml.MappingNode, prefix: str, path: str) -> None:
        lines: dict[str, int] = {}
        entries: dict[str, int] = {}
        for name, line, node in self._flat(group, prefix, path):
            whole = name if name in self.types else name.rpartition(".")[0]  # of an entry of lora.rank_pattern
            for other in (name, whole):  # once as lora.rank, once within lora
                if other in lines:
                    raise stands_twice(other, path, lines[other], line)
            lines[name] = line
            if whole != name:
                entries.setdefault(whole, line)
            elif name in entries:
                raise stands_twice(name, path, entries[name], line)
            self._add(name, node, path)

    def _flat(self, group: yaml.MappingNode, prefix: str, path: str) -> Iterator[tuple[str, int, yaml.Node]]:
        """Yield name, line and value of all settings in a group and the groups within it."""
        for key, (line, node) in pairs_of(group, prefix, path).items():
            name = prefix + key
            if isinstance(node, yaml.MappingNode) and node.value and self._kind(name) is None:
                yield from self._flat(node, f"{name}.", path)
            else:
                yield name, line, node

    def _kind(self, name: str) -> Any:
        """Return the type of a setting, or of the entries of one that is a mapping; None for others."""
        parent = self.types.get(name.rpartition(".")[0])
        # a mapping that may be null is one of the parts of its type
        mappings = [kind for kind in (parent, *get_args(parent)) if get_origin(kind) is dict]
        return self.types.get(name) or (get_args(mappings[0])[1] if mappings else None)

    def _add(self, name: str, node: yaml.Node, path: str, word: str | None = None) -> None:
        kind = self._kind(name)
        if inside := [key for key in self.types if key.startswith(f"{name}.")]:
            if _is_optional(self.config_class, name) and node.value in NULLS:
                self.left_out.add(name)
                return
            raise UserError(f"{name} is a group of settings, expected {', '.join(inside)}.")
        if kind is None:
            self.unknown.append(name)
            return
        typed = shortened(word if word is not None else source_of(node))
        try:
            value = value_of(node, forms(kind), name, path)
            setting, _, key = (name, "", "") if name in self.types else name.rpartition(".")
            self.put(setting, {**(self.values.get(setting) or {}), key: value} if key else value)
            self.left_out -= {group for group in self.left_out if setting.startswith(f"{group}.")}
        except OverflowError:
            raise UserError(f"out of range: {name} is {typed}. See --help.") from None
        except ValueError as error:
            raise UserError(f"{name} is {typed or 'empty'}; expected {str(error) or describe(kind)}.") from None
        except TypeError:
            raise UserError(f"{name} is {typed or 'empty'}; expected {describe(kind)}.") from None


def _without_text(value: Any, kind: Any) -> Any:
    """Return a value for jsonargparse, in which text and entries of any type are empty.

    It would read text as YAML, and import a class that `{class_path: NAME}` in an entry of any type names.
    """
    takes = forms(kind)
    return type(value)() if Any in takes or (str in takes and isinstance(value, str)) else value


@cache
def _parser_of(config_class: type) -> jsonargparse.ArgumentParser:
    """Return the parser whose arguments are the settings of a dataclass."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(exit_on_error=False, formatter_class=_Help)
    parser.add_argument("--config", action="config", help="YAML file with any of these settings.")
    hints = get_type_hints(config_class)
    groups = {name: group for name, kind in hints.items() if (group := group_of(kind)) and group is not kind}
    fields = [(name, group, dataclasses.field(default_factory=group)) for name, group in groups.items()]  # not null
    parser.add_class_arguments(
        dataclasses.make_dataclass(config_class.__name__, fields, bases=(config_class,), kw_only=True), as_group=True
    )
    return parser


def _is_optional(config_class: type, name: str) -> bool:
    """Return whether a group of settings may be null."""
    return NoneType in get_args(get_type_hints(config_class).get(name))


class _Help(jsonargparse.DefaultHelpFormatter):
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text


def _made(config_class: type, settings: jsonargparse.Namespace) -> Any:
    """Return a dataclass of settings. jsonargparse's `instantiate` would read text again."""
    hints = get_type_hints(config_class)
    given = {field.name: settings[field.name] for field in dataclasses.fields(config_class)}
    groups = {
        name: _made(group, value)
        for name, value in given.items()
        if value is not None and (group := group_of(hints[name]))
    }
    return config_class(**{**given, **groups})
