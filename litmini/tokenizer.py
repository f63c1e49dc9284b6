"""The tokenizer, stop ids and chat template that travel with a checkpoint.

Finetuning, generation and export use the same code: text rendered by a template is tokenised as it is, raw text gets the
special tokens (BOS) that the tokenizer itself adds.
"""

import re
from collections.abc import Sequence
from datetime import datetime
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Encoding, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from litmini.errors import UserError
from litmini.files import check_no_pointer, read_json, write_json, write_text
from litmini.literal_tokens import START, Encoded, LiteralTokens
from litmini.side_files import copy_side_files
from litmini.templates.form import TurnEnds
from litmini.templates.render import TOOLS, Parts
from litmini.templates.template import ChatTemplate, Message, find_template

if TYPE_CHECKING:
    from litmini.new_tokens import NewTokens

ROLES = ("system", "developer", "user", "assistant", "tool")
"""The roles that a message can have."""
OWN_VARIABLES = {"messages", "tools", "documents", "add_generation_prompt", "strftime_now"}


SAVED_KWARGS = "chat_template_kwargs"
"""The key of tokenizer_config.json that holds the template's variables of training."""


class Tokenizer:
    """The tokenizer of a checkpoint or adapter directory.

    Args:
        directory: holds `tokenizer.json` and, if they exist, `tokenizer_config.json`, `chat_template.jinja`,
            `generation_config.json` and `config.json`.
        chat_template: "auto" for the checkpoint's own template, "none" for none, one of `templates.builtin.BUILTIN`, or the
            path of a template file.
        began: the time that templates write with `strftime_now`; None: the current time.
        template_kwargs: variables of the template, such as enable_thinking; None: those saved with the checkpoint, if any.
        special_tokens_in_text: special tokens that people write in messages and texts are tokens, not text.
        new_tokens: texts that become tokens, if they are none: see `new_tokens.py`.

    Raises:
        UserError: a file is missing or damaged.
    """

    def __init__(
        self,
        directory: str | Path,
        chat_template: str = "auto",
        began: datetime | None = None,
        template_kwargs: dict[str, Any] | None = None,
        special_tokens_in_text: bool = False,
        new_tokens: Sequence[str] = (),
    ) -> None:
        self.directory = Path(directory)
        self.special_tokens_in_text = special_tokens_in_text
        file = self.directory / "tokenizer.json"
        if not file.is_file():
            raise UserError(
                f"{self.directory} has no tokenizer.json; a SentencePiece tokenizer.model alone is not read."
            )
        try:
            content = file.read_text(encoding="utf-8")
            self.fast = _with_exact_offsets(content)
        except Exception as error:  # tokenizers raises plain Exception
            check_no_pointer(file)
            raise UserError(f"{file} is damaged: {error}") from None
        self.settings = self._optional("tokenizer_config.json")
        self.chat_template, template_name = find_template(
            chat_template, self.directory, self.settings, lambda: bool(self._before_text)
        )
        self.new_tokens: NewTokens | None = None
        if new_tokens:
            self.fast = _with_exact_offsets(self._add(content, new_tokens))
        self.fast.no_truncation()
        self.fast.no_padding()
        self._tokens = self.settings  # bos_token, eos_token, ...
        if "added_tokens_decoder" not in self.settings:  # with older files, special_tokens_map.json takes precedence
            self._tokens = {**self.settings, **self._optional("special_tokens_map.json")}
        self.generation = self._optional("generation_config.json")
        added = self.fast.get_added_tokens_decoder()
        self.added_ids = set(added)
        self.special_ids = {i for i, token in added.items() if token.special}
        if chat_template not in ("auto", "none"):
            from litmini.templates.builtin import check_builtin

            special = {token.content for token in added.values() if token.special}
            check_builtin(chat_template, self.directory, special, self._token("eos_token"))
        saved = self.settings.get(SAVED_KWARGS, {})
        if not isinstance(saved, dict):
            raise self._wrong("tokenizer_config.json", SAVED_KWARGS, saved, "names and values")
        self.template_kwargs: dict[str, Any] = saved if template_kwargs is None else template_kwargs
        if own := sorted(self.template_kwargs.keys() & OWN_VARIABLES):
            raise UserError(
                f"template_kwargs has {', '.join(own)}, which litmini gives to templates itself: leave it out."
            )
        named = {key: self._token(key) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
        variables = {key: token for key, token in named.items() if token} | self.template_kwargs
        self.template = ChatTemplate(self.chat_template, template_name, self.directory, variables, began)
        ids: list[int | None] = []
        if eos := self._token("eos_token"):
            ids.append(self.fast.token_to_id(eos))
        config = self._optional("config.json")
        text = config.get("text_config")  # of a multimodal model
        config = {**(text if isinstance(text, dict) else {}), **config}
        for name, settings in (("generation_config", self.generation), ("config", config)):
            found = settings.get("eos_token_id")
            found = found if isinstance(found, list) else [found]
            if any(i is not None and type(i) is not int for i in found):
                raise self._wrong(f"{name}.json", "eos_token_id", found, "a token id or a list of them")
            ids += found
        if self.chat_template:
            ids += [self.fast.token_to_id(token) for token in self.turn_ends if token]
        self.stop_ids: list[int] = list(dict.fromkeys(i for i in ids if i is not None))
        if not self.stop_ids:
            raise UserError(f"{self.directory} names no end token in tokenizer_config.json or generation_config.json.")

    def _add(self, content: str, tokens: Sequence[str]) -> str:
        """Return the content of tokenizer.json with the new tokens `tokens`."""
        from litmini.new_tokens import new_tokens, with_settings, with_tokens

        self.new_tokens = new_tokens(content, tokens, self.chat_template or "")
        self.settings = with_settings(self.settings, self.new_tokens.entries)
        return with_tokens(content, self.new_tokens.entries)

    def _optional(self, name: str) -> dict[str, Any]:
        file = self.directory / name
        return read_json(file) if file.is_file() else {}

    def _token(self, key: str) -> str | None:
        found = self._tokens.get(key)
        token = found.get("content", found) if isinstance(found, dict) else found
        if token is not None and not isinstance(token, str):
            raise self._wrong("tokenizer_config.json", key, found, "a token's text or an object with it as content")
        return token

    def _wrong(self, file: str, key: str, found: Any, expected: str) -> UserError:
        return UserError(f"{self.directory / file}: {key} is {found!r:.80}; expected {expected}.")

    def special_id(self, key: str) -> int | None:
        """Return the id of the token that `tokenizer_config.json` calls bos_token, eos_token, ..., or None."""
        token = self._token(key)
        return None if token is None else self.fast.token_to_id(token)

    @cached_property
    def turn_ends(self) -> TurnEnds:
        """The special tokens with which the template ends an assistant's turns."""

        def specials(text: str) -> list[str | None]:
            ids = self.encode(text, special=False)
            return [self.fast.id_to_token(i) if i in self.special_ids else None for i in ids]

        return self.template.turn_ends(specials)

    def apply_template(
        self, messages: list[Message], add_generation_prompt: bool = False, tools: list[Any] | None = None
    ) -> str:
        """Render messages as the text that the model was trained on, see `ChatTemplate.apply`."""
        return self.template.apply(messages, add_generation_prompt, tools)

    @cached_property
    def _literal(self) -> LiteralTokens:
        return LiteralTokens(self.fast, self.special_ids)

    def mark(self, value: Any) -> Any:
        """Return a text, or messages, with marks around special tokens, which `encode` takes as text then.

        With `special_tokens_in_text` there are no marks.
        """
        return value if self.special_tokens_in_text else self._literal.mark(value)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Return the token ids of `text`; with `special`, after the tokens that the tokenizer puts before raw text (BOS)."""
        ids = self._literal.encode(text).ids if START in text else self.fast.encode(text, add_special_tokens=False).ids
        return [*self._before_text, *ids] if special else ids

    @cached_property
    def _before_text(self) -> list[int]:
        framed = self.fast.encode("a")
        return framed.ids[: [*framed.special_tokens_mask, 0].index(0)]  # text may become no token at all

    def encode_batch(self, texts: list[str]) -> list[Encoding | Encoded]:
        """Return the encodings (ids, offsets) without special tokens, computed on all cores."""
        encodings: list[Encoding | Encoded] = list(self.fast.encode_batch(texts, add_special_tokens=False))
        for i, text in enumerate(texts):
            if START in text:
                encodings[i] = self._literal.encode(text)
        return encodings

    def encode_prompt(self, prompt: str | list[Message], tools: list[Any] | None = None) -> list[int]:
        """Return the token ids of a prompt: messages, or text as a user's turn; without a template, raw text.

        Args:
            tools: JSON schemas of the functions that the model may call.

        Raises:
            UserError: there is no template for messages, or it fails or leaves out the tools.
        """
        if self.chat_template is None:
            if not isinstance(prompt, str):
                raise UserError(f"{self.directory} has no chat template: give the prompt as text.")
            return self.encode(self.mark(prompt))
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        messages, tools = self.mark(messages), self.mark(tools)
        left_out = {i: f"messages[{i}], of the role {m['role']}" for i, m in enumerate(messages) if _may_be_unknown(m)}
        left_out |= {TOOLS: "the tools"} if tools else {}
        parts: Parts = [(len(messages), True, i) for i in (None, *left_out)]
        text, *others = self.template.render([(self.template.in_form(messages), tools, parts)])
        if isinstance(text, UserError):
            raise text
        for what, other in zip(left_out.values(), others, strict=True):
            if other == text:
                raise UserError(f"{self.template.name} leaves out {what}.")
        return self.encode(text, special=False)

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        return self.fast.decode(ids, skip_special_tokens=skip_special)

    def save(self, directory: Path) -> None:
        """Write the tokenizer, the template and its variables in use and all stop ids into `directory`, beside the weights."""
        copy_side_files(self.directory, directory)
        if self.new_tokens:
            from litmini.new_tokens import with_tokens

            content = (self.directory / "tokenizer.json").read_text(encoding="utf-8")
            write_text(directory / "tokenizer.json", with_tokens(content, self.new_tokens.entries))
        settings = {k: v for k, v in self.settings.items() if k not in ("chat_template", SAVED_KWARGS)}
        settings |= {SAVED_KWARGS: self.template_kwargs} if self.template_kwargs else {}
        write_json(directory / "tokenizer_config.json", settings)
        template = directory / "chat_template.jinja"
        template.unlink(missing_ok=True)
        if self.chat_template is not None:
            template.write_text(self.chat_template, encoding="utf-8")
        stops = self.stop_ids if len(self.stop_ids) > 1 else self.stop_ids[0]
        write_json(directory / "generation_config.json", {**self.generation, "eos_token_id": stops})


def _with_exact_offsets(content: str) -> FastTokenizer:
    """Return the tokenizer of a tokenizer.json, with offsets that cover white space, too; ids are the same."""
    return FastTokenizer.from_str(re.sub(r'"trim_offsets":\s*true', '"trim_offsets": false', content))


def _may_be_unknown(message: Message) -> bool:
    """Return whether a template may leave out a message, since it does not know the role."""
    return message.get("role") not in ("user", "assistant") and bool(str(message.get("content") or "").strip())


@cache
def byte_letters() -> list[str]:
    """Return the letter of each byte in a byte-level vocabulary (GPT-2): itself if it is visible, else one from U+0100 on."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # visible bytes, then the letters of the others, in order
    visible = {letter for letter in letters if ord(letter) < 256}
    others = iter(letters[len(visible) :])
    return [chr(byte) if chr(byte) in visible else next(others) for byte in range(256)]
