"""Records with a label: a text or a conversation, and a class, a list of classes, or a number."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from litmini.config.classify import ProblemType
from litmini.data.dataset import find_files
from litmini.data.formats import bad_records, read_messages
from litmini.data.readers import check_text, parse_json, read_chunks
from litmini.errors import UserError
from litmini.files import content_hash, existing_file
from litmini.tokenizer import Message

Label = str | int | float | tuple[str, ...]
"""Name of a class; a whole number, which is the name of a class or a value; a value; or the names of several classes."""
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
SETTING = "--classes.problem_type"


@dataclass(frozen=True)
class LabelledText:
    """One record."""

    where: str
    """file:line, for errors."""
    text: str
    """Of a conversation: what its turns say, a turn a line."""
    label: Label
    messages: list[Message] | None = None
    """Of a conversation."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its classes."""
        return self.label if isinstance(self.label, tuple) else (str(self.label),)


@dataclass(frozen=True)
class TextFile:
    """The records of one file."""

    data_set: int
    """Number of its data set."""
    name: str
    """In the manifest."""
    path: str
    sha256: str
    texts: list[LabelledText]


def read_files(data_sets: list[str], columns: dict[str, str] | None = None) -> list[TextFile]:
    """Return the files of several data sets with their records."""
    paths = [(number, name, path) for number, each in enumerate(data_sets) for name, path in find_files(each).items()]
    hashes = [content_hash(existing_file(path, "data file")) for _, _, path in paths]  # of what is read, or older
    return [TextFile(*at, sha256, read_texts(at[-1], columns)) for at, sha256 in zip(paths, hashes, strict=True)]


def read_texts(path: str, columns: dict[str, str] | None = None) -> list[LabelledText]:
    """Return the records of a file.

    Raises:
        UserError: the file is missing or empty, or has records without a text or a label; all named by file:line.
    """
    texts: list[LabelledText] = []
    problems: list[str] = []
    total = 0
    for chunk in read_chunks(path, columns):
        total += len(chunk.locations)
        for where, record in chunk.records():
            try:
                texts.append(_labelled(where, record, path.lower().endswith(".csv")))
            except ValueError as error:
                problems.append(f"{where}: {error}")
    if problems:
        raise bad_records(problems, total)
    return texts


def _labelled(where: str, record: Any, is_csv: bool) -> LabelledText:
    """Return a record as a `LabelledText`; a ValueError says what is wrong with it."""
    if isinstance(record, ValueError):
        raise record
    keys = record.keys() if isinstance(record, dict) else set()
    if "label" not in keys or not keys & {"text", "messages"}:
        found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"found {found}; expected text and label, or messages and label")
    if keys >= {"text", "messages"}:
        raise ValueError("has text and messages; expected one of them")
    messages = None
    if "messages" in keys:
        messages, _ = read_messages(record["messages"])
        text = "\n".join(turn.get("content", "") for turn in messages)
    else:
        text = check_text(record["text"], "text")
    if not text.strip():
        raise ValueError("text is empty" if messages is None else "messages say nothing")
    return LabelledText(where, text, _label(record["label"], is_csv), messages)


def _label(value: Any, is_csv: bool) -> Label:
    if is_csv and isinstance(value, str) and value.lstrip().startswith("["):
        read = parse_json(value)
        value = read if isinstance(read, list) else value
    if isinstance(value, list):
        names = [_name(one) for one in value]
        if len(set(names)) < len(names):
            raise ValueError("label has one name twice")
        return tuple(names)
    if isinstance(value, float):
        if not abs(value) < 1e30:
            raise ValueError(f"label is {value}, expected a finite number")
        return value
    return value if isinstance(value, int) and not isinstance(value, bool) else _name(value)


def _name(value: Any) -> str:
    """Return the name of one class."""
    if isinstance(value, bool):
        value = str(value).lower()
    elif isinstance(value, int):
        value = str(value)
    elif not isinstance(value, str):
        found = type(value).__name__
        raise ValueError(f"label is {found}, expected the name or number of a class, a list of these, or a number")
    if not check_text(value, "label").strip():
        raise ValueError("label is empty")
    return value


def find_problem_type(texts: list[LabelledText], asked: ProblemType, reason: str | None = None) -> str:
    """Return what is learned from labels: what is asked for, or what their types say.

    Args:
        reason: why it is `asked` for, for errors; None: the setting says so.

    Raises:
        UserError: labels of several types, or others than `asked` needs; the first of them is named by file:line.
    """
    is_list: Callable[[LabelledText], bool] = lambda text: isinstance(text.label, tuple)  # noqa: E731
    is_float: Callable[[LabelledText], bool] = lambda text: isinstance(text.label, float)  # noqa: E731
    lists, floats = next(filter(is_list, texts), None), next(filter(is_float, texts), None)
    found = asked if asked != "auto" else MULTI if lists else REGRESSION if floats else SINGLE
    fits: Callable[[LabelledText], bool]
    if found == MULTI:
        fits, expected, first = is_list, "a list of labels", lists
    elif found == REGRESSION:
        fits, expected, first = (lambda text: _number(text.label) is not None), "a number", floats
    else:
        fits, expected, first = (lambda text: not is_list(text) and not is_float(text)), "the name of one class", None
    wrong = next((text for text in texts if not fits(text)), None)
    if wrong is None:
        return found
    label = list(wrong.label) if isinstance(wrong.label, tuple) else wrong.label
    why = (reason or f"{SETTING} is {asked}") if asked != "auto" else f"as {first.where} has one" if first else ""
    raise UserError(f"{wrong.where}: label is {label!r:.80}, expected {expected}: {why}.")


def _number(label: Label) -> float | None:
    """Return a label as a number, None if it is none; texts are numbers as well, since CSV has nothing else."""
    if isinstance(label, tuple):
        return None
    try:
        number = float(label)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) < 1e30 else None


def value_of(text: LabelledText) -> float:
    """Return the label of a record of a regression."""
    number = _number(text.label)
    if number is None:
        raise UserError(f"{text.where}: label is {text.label!r:.80}, expected a number, as in the training data.")
    return number
