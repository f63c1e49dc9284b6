"""The chat template of a checkpoint: where it is found, and messages as the text that its model was trained on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from litmini.errors import UserError
from litmini.files import check_no_pointer, existing_file, read_json
from litmini.templates.form import TemplateForm, TurnEnds, find_ends, find_form
from litmini.templates.render import BadTemplate, Conversation, render

Message = dict[str, Any]
ENTRY = {"name", "template"}
"""The keys of one of several chat templates in tokenizer_config.json."""
PROCESSOR_TEMPLATE = "chat_template.json"
"""A multimodal model's; transformers prefers it to all others, so a result must not keep it."""


class ChatTemplate:
    """A chat template, and the variables that it sees.

    Args:
        text: jinja; None: there is none, and rendering is an error that names choices.
        name: what errors call it.
        directory: of its tokenizer, for errors.
        variables: such as bos_token and enable_thinking.
        began: the time that templates write with `strftime_now`; None: the current time.
    """

    def __init__(
        self, text: str | None, name: str, directory: Path, variables: dict[str, Any], began: datetime | None
    ) -> None:
        self.text, self.name, self.directory = text, name, directory
        self.variables, self.began = variables, began
        self._forms: dict[bool, TemplateForm] = {}

    def render(self, conversations: Sequence[Conversation]) -> Iterator[str | UserError]:
        """Yield the texts of parts of conversations (see `render.render`), an error in place of one that fails.

        Raises:
            UserError: there is no template, it is not valid jinja, or exceeds a limit.
        """
        if self.text is None:
            from litmini.templates.builtin import NAMES

            raise BadTemplate(
                f"{self.directory} has no chat template, as base models have none. Choose one with --data.chat_template: "
                f"{NAMES} or FILE.jinja. It is saved with the result."
            )
        try:
            for text in render(self.text, conversations, self.variables, self.began or datetime.now()):
                yield text if isinstance(text, str) else UserError(f"{self.name} {text}")
        except BadTemplate as error:
            raise BadTemplate(f"{self.name} {error}") from None

    def apply(
        self, messages: list[Message], add_generation_prompt: bool = False, tools: list[Any] | None = None
    ) -> str:
        """Render messages ({"role": ..., "content": ...}) as the text that the model was trained on.

        Args:
            tools: JSON schemas of the functions that the model may call.

        Raises:
            UserError: there is no template, it is not valid jinja, refuses these messages or exceeds a limit.
        """
        (text,) = self.render([(self.in_form(messages), tools, [(len(messages), add_generation_prompt, None)])])
        if isinstance(text, UserError):
            raise text
        return text

    def in_form(self, messages: list[Message]) -> list[Message]:
        """Return messages as the template wants them: arguments of calls, content beside calls, or content in parts."""
        return self.form(any(message.get("tool_calls") for message in messages)).apply(messages)

    def form(self, has_calls: bool) -> TemplateForm:
        """Return the form in which the template wants messages, with calls of tools or without."""

        def render(messages: list[Message]) -> str | None:
            (text,) = self.render([(messages, None, [(len(messages), False, None)])])
            return text if isinstance(text, str) else None

        if has_calls not in self._forms:
            self._forms[has_calls] = find_form(render, has_calls)
        return self._forms[has_calls]

    @cached_property
    def after_completion(self) -> str:
        """The text that the template puts after an assistant's turn: at the end of a conversation or, if the template refuses
        that, before a user's turn; "" if it refuses both."""
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "completion"}]
        for messages in (turns, [*turns, turns[0]]):
            _, found, tail = self._text_of(messages).rpartition("completion")
            if found:
                return tail.partition("question")[0]
        return ""

    def turn_ends(self, specials: Callable[[str], list[str | None]]) -> TurnEnds:
        """Return the special tokens with which the template ends an assistant's turns; `specials` as `find_ends` has it."""
        return find_ends(self.after_completion, self._text_of, specials, "tool_calls" in (self.text or ""))

    def _text_of(self, messages: list[Message]) -> str:
        """Return the text of messages; "" if the template refuses them."""
        try:
            return self.apply(messages)
        except BadTemplate:
            raise
        except UserError:
            return ""

    def dates(self) -> list[str]:
        """Return the current date as the template writes it, in each of its forms; [] if it writes none."""
        now, template = self.began or datetime.now(), self.text or ""
        forms = re.findall(r"strftime_now\(\s*['\"]([^'\"]*)", template)
        return [now.strftime(form) for form in ("%x", *forms)] if "strftime_now" in template else []


def find_template(
    choice: str, directory: Path, settings: dict[str, Any], puts_bos: Callable[[], bool]
) -> tuple[str | None, str]:
    """Return the text of a chat template, None if there is none, and what errors call it.

    Args:
        choice: "auto" for the checkpoint's own, "none" for none, one of `BUILTIN`, or the path of a template file.
        settings: tokenizer_config.json of `directory`.
        puts_bos: whether the tokenizer puts BOS before a text.

    Raises:
        UserError: there is no such choice, or a file is missing or damaged.
    """
    if choice in ("auto", "none"):
        return _own_template(directory, settings) if choice == "auto" else None, f"the chat template of {directory}"
    from litmini.templates.builtin import BOS, BUILTIN, NAMES

    if choice in BUILTIN:
        text = BOS * puts_bos() + BUILTIN[choice].text
    elif Path(choice).suffix or Path(choice).exists():
        text = _read(existing_file(choice, "chat template"))
    else:
        raise UserError(f"chat_template is {choice}; expected auto, none, {NAMES}, or the path of a .jinja file.")
    return text, f"the chat template {choice}"


def _own_template(directory: Path, settings: dict[str, Any]) -> str | None:
    file, of_processor = directory / "chat_template.jinja", directory / PROCESSOR_TEMPLATE
    if file.is_file():
        return _read(file)
    found = read_json(of_processor).get("chat_template") if of_processor.is_file() else None
    found = found or settings.get("chat_template")
    if isinstance(found, list) and all(isinstance(entry, dict) and entry.keys() >= ENTRY for entry in found):
        found = next((entry["template"] for entry in found if entry["name"] == "default"), None)
    if found is not None and not isinstance(found, str):
        raise UserError(
            f"{directory / 'tokenizer_config.json'}: chat_template is {found!r:.80}; expected a template's text or a list of "
            f"objects with name and template."
        )
    return found


def _read(file: Path) -> str:
    check_no_pointer(file)
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"chat template {file} is not UTF-8 text: {error}") from None
