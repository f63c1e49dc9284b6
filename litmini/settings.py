"""Settings: reads them from YAML files and from words of a command line, and makes a dataclass of them."""

import dataclasses
from dataclasses import MISSING
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, TypeVar, get_origin, get_type_hints

import yaml

from litmini.errors import UserError
from litmini.files import existing_file
from litmini.setting_values import Reader, parts_of

T = TypeVar("T")


def types_of(config_class: type, prefix: str = "") -> dict[str, Any]:
    """Return dotted name -> type of all settings in a dataclass and its groups, which are dataclasses too."""
    found: dict[str, Any] = {}
    hints = get_type_hints(config_class, include_extras=True)
    for field in dataclasses.fields(config_class):
        kind = hints[field.name]
        inside = types_of(kind, f"{prefix}{field.name}.") if dataclasses.is_dataclass(kind) else {}  # type: ignore[arg-type]
        found |= inside or {prefix + field.name: kind}
    return found


def read_file(path: str, types: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted name -> value of the settings in a YAML file.

    Args:
        types: of all settings.
        prefix: of the names in the file, where it holds one group.

    Raises:
        UserError: the file is missing or no YAML, a setting is unknown, stands twice or has another type.
    """
    try:
        text = existing_file(path, "config file").read_text(encoding="utf-8-sig")
        node = yaml.compose(text, yaml.SafeLoader)
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{path} holds no settings; expected lines such as out_dir: out/NAME")
        return Reader(types, path).group(node, prefix)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply, or an alias holds itself.") from None


def read_word(name: str, word: str, types: dict[str, Any]) -> dict[str, Any]:
    """Return dotted name -> value of a setting, or a group of them, as `--name word` gives it."""
    reader = Reader(types, "")
    kind = types.get(name)
    try:
        node = yaml.compose(word, yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError):
        node = None
    takes = {get_origin(part) or part for part in parts_of(kind)}
    wanted = takes & ({dict, Any} if isinstance(node, yaml.MappingNode) else {list, tuple, Any})
    is_whole = isinstance(node, yaml.CollectionNode) and node.flow_style  # [a] or {a: 1}, but neither "- a" nor "a: 1"
    if not is_whole or (kind is not None and not wanted):
        if takes <= {str, Annotated, NoneType}:
            return {name: None if word == "null" and NoneType in takes and str in takes else word}
        node = yaml.ScalarNode("", word)  # as it was typed, with # and quotes
    if kind is None and (inside := [key for key in types if key.startswith(f"{name}.")]):
        if isinstance(node, yaml.MappingNode):
            return reader.group(node, f"{name}.")
        if Path(word).is_file():
            return read_file(word, types, f"{name}.")
        raise UserError(f"{name} is a group of settings, expected {', '.join(inside)}.")
    return reader.setting(name, node, word)


def build(config_class: type[T], values: dict[str, Any], prefix: str = "") -> T:
    """Return a dataclass of settings with these values, and the defaults of all others.

    Raises:
        UserError: values are missing or out of range.
    """
    hints = get_type_hints(config_class)
    given: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):  # type: ignore[arg-type]
        name, kind = prefix + field.name, hints[field.name]
        if not dataclasses.is_dataclass(kind):
            given |= {field.name: values[name]} if name in values else {}
        elif field.default_factory is MISSING:
            given[field.name] = build(kind, values, f"{name}.")  # type: ignore[arg-type]
        elif inside := {k.removeprefix(f"{name}."): v for k, v in values.items() if k.startswith(f"{name}.")}:
            given[field.name] = dataclasses.replace(field.default_factory(), **inside)
    return config_class(**given)


def missing(config_class: type, values: dict[str, Any]) -> list[str]:
    """Return the settings without a default that have no value."""
    return [name for name, default in defaults(config_class).items() if default is MISSING and name not in values]


def defaults(config_class: type, prefix: str = "") -> dict[str, Any]:
    """Return dotted name -> default of all settings; `MISSING` for those without one."""
    found: dict[str, Any] = {}
    hints = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        name, kind, factory = prefix + field.name, hints[field.name], field.default_factory
        if factory is not MISSING:
            value = factory()
            is_group = dataclasses.is_dataclass(kind)
            found |= {f"{name}.{k}": v for k, v in vars(value).items()} if is_group else {name: value}
        elif dataclasses.is_dataclass(kind):
            found |= defaults(kind, f"{name}.")  # type: ignore[arg-type]
        else:
            found[name] = field.default
    return found


def merge(values: dict[str, Any], more: dict[str, Any], types: dict[str, Any]) -> None:
    """Add values to others, which they replace; `name.key` sets one entry of a setting that is a mapping."""
    for name, value in more.items():
        setting, _, key = (name, "", "") if name in types else name.rpartition(".")
        values[setting] = {**(values.get(setting) or {}), key: value} if key else value
