"""Parses command lines into settings, and prints the errors of commands.

Nothing heavy is imported here, so that `--help` is fast: a script imports torch after parsing.
"""

import litmini.interrupts  # noqa: F401  (first, for Ctrl-C during all other imports)

# isort: split
import difflib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NoReturn, TypeVar

from litmini.distributed.processes import alone, first_to_fail, is_first, leave
from litmini.errors import UserError
from litmini.settings import Settings, forms
from litmini.system import drop_output, is_disk_full, outlive_readers, repair_streams, unlock_all

T = TypeVar("T")


def parse(
    config_class: type[T],
    doc: str | None,
    argv: Sequence[str] | None = None,
    positional: Sequence[str] = (),
    renamed: Mapping[str, str] | None = None,
) -> T:
    """Read a command line into `config_class`. The command line overrides `--config FILE`, which overrides the defaults.

    Errors are printed in a short paragraph and end the process with status 2.

    Args:
        config_class: a dataclass; its nested dataclasses become dotted settings.
        doc: the script's docstring, shown by `--help`.
        argv: the arguments after the script's name; those of this process by default.
        positional: the fields that are positional arguments, in order.
        renamed: names on the command line -> names of settings, where they differ.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    settings = Settings(config_class)
    if "--help" in words or "-h" in words:
        settings.print_help((doc or "").strip())
        sys.exit(0)
    try:
        switches = {f"--{name}" for name, kind in settings.types.items() if bool in forms(kind)}
        given, show = _arrange(words, switches, positional, renamed or {})
        for name, word in given:
            if isinstance(word, list):
                settings.put(name, word)
            elif name == "config":
                settings.add_file(word)
            else:
                settings.add_word(name, word)
        if settings.unknown:
            known = list(settings.types)
            raise UserError(
                "\n".join(f"unknown setting '{name}': {_nearest(name, known)}" for name in settings.unknown)
            )
        if show:
            print(settings.as_yaml(), end="")
            sys.exit(0)
        return settings.build()
    except UserError as error:
        text = str(error).encode("utf-8", "backslashreplace").decode()
        print(f"error: {text if len(text) < 2000 else f'{text[:1000]} ... {text[-500:]}'}", file=sys.stderr)
        sys.exit(2)


def _nearest(key: str, known: list[str]) -> str:
    """Return a hint for an unknown setting: the most similar known one, by its whole name or by the last part."""
    last_parts = {name.rsplit(".", 1)[-1]: name for name in known}
    last = key.rsplit(".", 1)[-1]
    near = [last_parts[last]] if last in last_parts else difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    near = near or [last_parts[name] for name in difflib.get_close_matches(last, last_parts, n=1)]
    return f"did you mean '{near[0]}'?" if near else "see --help for the existing ones."


def _arrange(
    words: list[str], switches: Collection[str], positional: Sequence[str], renamed: Mapping[str, str]
) -> tuple[list[tuple[str, str | list[str]]], bool]:
    """Return (name, word) of the arguments, config files first, so that the rest overrides them; and whether to print them.

    `--switch` alone is true. A positional field written `names...` takes all remaining positional arguments.
    """
    files: list[tuple[str, str | list[str]]] = []
    rest: list[tuple[str, str | list[str]]] = []
    free = list(positional)
    many: list[str] = []
    extra: list[str] = []
    show = False
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            if free and free[0].endswith("...") and not word.startswith("-"):
                many.append(word)
            elif free and not word.startswith("-"):
                rest.append((free.pop(0), word))
            else:
                extra.append(word)
            continue
        name, is_pair, value = word[2:].partition("=")
        name = renamed.get(name, name)
        if name == "print_config":
            show = True
            continue
        if not is_pair:
            if words and not words[0].startswith("--"):
                value = words.pop(0)
            elif word in switches:
                value = "true"
            else:
                raise UserError(f"{word}: expected one argument")
        if name.startswith("model."):  # fields of a family's Config, which is known only after the family is chosen
            name = name.replace("model.", "model_fields.", 1)
        (files if name == "config" else rest).append((name, value))
    if extra:
        raise UserError(f"unexpected arguments: {' '.join(extra)}; settings are written --name value.")
    return files + rest + ([(free[0].removesuffix("..."), many)] if many else []), show


def command(
    main: Callable[[T], object],
    config_class: type[T],
    doc: str | None,
    positional: Sequence[str] = (),
    renamed: Mapping[str, str] | None = None,
) -> NoReturn:
    """Run a script: parse, call `main`, print errors that the user can fix in a line on stderr, and set the exit status."""
    repair_streams()
    config = parse(config_class, doc, positional=positional, renamed=renamed)
    # oneDNN caches up to a MiB of compiled code for each shape of a matmul, by default for 1,024 shapes
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    if not is_first():
        # torch would log every connection that another process closes
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        main(config)
        sys.stdout.flush()
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
        print(f"{error.title or chr(10)}{error}", file=sys.stderr)
        return error.status
    if isinstance(error, KeyboardInterrupt):
        print("\ninterrupted.", file=sys.stderr)
        return 128 + signal.SIGINT
    if isinstance(error, BrokenPipeError):  # the reader of our output has ended, as in `generate.py ... | head -1`
        outlive_readers()
    elif is_disk_full(error):
        print(
            f"error: the disk is full ({error}). Nothing finished was lost; free some space and run the command again.",
            file=sys.stderr,
        )
        drop_output()
    elif (
        isinstance(error, OSError) and error.filename is not None
    ):  # no permission, a file where a directory must be, ...
        print(f"error: {error.strerror}: {error.filename}", file=sys.stderr)
    elif alone():
        raise error
    else:
        traceback.print_exception(error)
    return 1
