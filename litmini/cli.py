"""Parses command lines into settings, and prints the errors of commands.

Nothing heavy is imported here, so that `--help` is fast: a script imports torch after parsing.
"""

import dataclasses
import difflib
import io
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from types import UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import jsonargparse
import yaml

from litmini.distributed.processes import alone, first_to_fail, is_first, leave
from litmini.errors import UserError
from litmini.files import existing_file
from litmini.system import is_disk_full, unlock_all

T = TypeVar("T")


class _Parser(jsonargparse.ArgumentParser):
    """Prints errors in one short paragraph, names the nearest known key for an unknown one, and exits with status 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        kinds = {a.dest: getattr(a, "_typehint", None) for a in self._actions}
        known = [key for key, kind in kinds.items() if kind and not dataclasses.is_dataclass(kind)]
        unknown = re.findall(r"(?<!\S)--([\w.]+)", message) if "unrecognized arguments" in message.lower() else []
        if nested := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
            unknown = [f"{nested[1]}.{nested[2]}"]
        elif option := re.search(
            r"(?:Option|Key) '([\w.]+)' is not accepted|does not accept option '([\w.]+)'", message
        ):
            unknown = [option[1] or option[2]]
        wrong = re.search(r'Parser key "([\w.]+)":.*?(?:Got|Given) value: ([^\n]*)', message, re.DOTALL)
        if unknown:
            message = "\n".join(f"unknown setting '{key}': {_nearest(key, known)}" for key in unknown)
        elif wrong and wrong[1] in known:
            message = f"{wrong[1]} is {wrong[2] or 'empty'}; expected {_describe(kinds[wrong[1]])}."
        elif group := re.search(r'Parser key "([\w.]+)":\s+Unable to load config', message):
            inside = [key for key in known if key.startswith(f"{group[1]}.")]
            message = f"{group[1]} is a group of settings, expected {', '.join(inside)}."
        elif found := re.search(r"unrecognized arguments: (.*)", message, re.IGNORECASE):
            message = f"unexpected arguments: {found[1]}; settings are written --name value."
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def _nearest(key: str, known: list[str]) -> str:
    """Return a hint for an unknown setting: the most similar known one, by its whole name or by the last part."""
    last_parts = {name.rsplit(".", 1)[-1]: name for name in known}
    last = key.rsplit(".", 1)[-1]
    near = [last_parts[last]] if last in last_parts else difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    near = near or [last_parts[name] for name in difflib.get_close_matches(last, last_parts, n=1)]
    return f"did you mean '{near[0]}'?" if near else "see --help for the existing ones."


def _describe(kind: Any) -> str:
    """Return a field's type in words."""
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_describe(part) for part in get_args(kind))
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    words |= {dict[str, int]: "names and numbers such as '{q_proj: 8}'", dict[str, float]: "such as '{q_proj: 8.0}'"}
    words |= {list[str]: "a list such as '[a, b]'", tuple[float, float]: "two numbers such as '[0.9, 0.95]'"}
    return words.get(kind) or str(kind)


def parse(config_class: type[T], doc: str, argv: Sequence[str] | None = None, positional: Sequence[str] = ()) -> T:
    """Read a command line into `config_class`. The command line overrides `--config FILE`, which overrides the defaults.

    Args:
        config_class: a dataclass; its nested dataclasses become dotted settings.
        doc: the script's docstring, shown by `--help`.
        argv: the arguments after the script's name; those of this process by default.
        positional: the fields that are positional arguments, in order.
    """
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(
        allow_abbrev=False,
        description=doc.strip(),
        formatter_class=type("Help", (jsonargparse.DefaultHelpFormatter,), {"_fill_text": _keep}),
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these settings.")
    parser.add_class_arguments(config_class, as_group=True)
    hints = {f"--{a.dest}": getattr(a, "_typehint", None) for a in parser._actions}
    switches = [name for name, hint in hints.items() if hint is bool or bool in get_args(hint)]
    words = _arrange(list(sys.argv[1:] if argv is None else argv), switches, positional)
    for word in words:
        if word.startswith("--config="):
            _check_yaml(word.removeprefix("--config="), parser)
    try:
        values = parser.instantiate(parser.parse_args(words))
        return config_class(**{f.name: getattr(values, f.name) for f in dataclasses.fields(config_class)})  # type: ignore[arg-type]
    except UserError as error:  # a value out of range
        parser.error(str(error))
    except ValueError as error:  # the same in a group that may be null
        if isinstance(error.__cause__, UserError):
            parser.error(str(error.__cause__))
        raise


def _check_yaml(path: str, parser: _Parser) -> None:
    try:
        file = existing_file(path, "config file")
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except UserError as error:
        parser.error(str(error))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"{path} is not valid YAML: {error}")
    if not isinstance(settings, dict):
        parser.error(f"{path} holds no settings; expected lines such as out_dir: out/NAME")


def _arrange(words: list[str], switches: list[str], positional: Sequence[str]) -> list[str]:
    """Return the arguments of a command line as `--name=value`, config files first, so that the rest overrides them.

    A positional NAME becomes --name=NAME, and --switch becomes --switch=true. A positional field written `names...` takes
    all remaining positional arguments.
    """
    files: list[str] = []
    rest: list[str] = []
    free = list(positional)
    many: list[str] = []
    while words:
        word = words.pop(0)
        if word.startswith("--") and "=" not in word and word not in ("--help", "--print_config"):
            if words and not words[0].startswith("--"):
                word += f"={words.pop(0)}"
            elif word in switches:
                word += "=true"
        elif not word.startswith("-") and free and free[0].endswith("..."):
            many.append(word)
            continue
        elif not word.startswith("-") and free:
            word = f"--{free.pop(0)}={word}"
        if word.startswith("--model."):  # fields of a family's Config, which is known only after the family is chosen
            word = word.replace("--model.", "--model_fields.", 1)
        (files if word.startswith("--config=") else rest).append(word)
    if many:
        rest.append(f"--{free[0].removesuffix('...')}={json.dumps(many)}")
    return files + rest


def _keep(self: Any, text: str, width: int, indent: str) -> str:
    return text


def command(main: Callable[[T], object], config_class: type[T], doc: str, positional: Sequence[str] = ()) -> NoReturn:
    """Run a script: parse, call `main`, print errors that the user can fix in a line on stderr, and set the exit status."""
    config = parse(config_class, doc, positional=positional)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? for other characters
    # oneDNN caches up to a MiB of compiled code for each shape of a matmul, by default for 1,024 shapes
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    if not is_first():
        os.environ.setdefault(
            "TORCH_CPP_LOG_LEVEL", "ERROR"
        )  # torch would log every connection that another process closes
    try:
        main(config)
    except SystemExit:
        raise
    except BaseException as error:
        leave(_report(error) if first_to_fail(error) else 1)
    finally:
        unlock_all()
    leave(0)


def _report(error: BaseException) -> int:
    """Print an error that the user can fix, and return the exit status; re-raise any other error."""
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr)
        return error.status
    if isinstance(error, KeyboardInterrupt):
        print("\ninterrupted.", file=sys.stderr)
        return 128 + signal.SIGINT
    if isinstance(error, BrokenPipeError):  # the reader of our output has ended, as in `generate.py ... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    elif is_disk_full(error):
        print(
            f"error: the disk is full ({error}). Nothing finished was lost; free some space and run the command again.",
            file=sys.stderr,
        )
    elif (
        isinstance(error, OSError) and error.filename is not None
    ):  # no permission, a file where a directory must be, ...
        print(f"error: {error.strerror}: {error.filename}", file=sys.stderr)
    elif alone():
        raise error
    else:
        traceback.print_exception(error)
    return 1
