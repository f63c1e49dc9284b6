"""An assistant's turn, and what the model says when it is asked for it."""

import re
from dataclasses import dataclass
from functools import cached_property

from litmini.templates.render import REASONING
from litmini.tokenizer import Message

END_THINK = "</think>"
ASKS = re.compile(rf"<think>\s*({END_THINK}\s*)?\Z")
"""The end of a prompt after which the model writes its reasoning or, if that is closed, its completion."""
FIRST = (
    "the conversation begins with the assistant, and the chat template has no prompt before its first turn. Begin with a "
    "user's turn, or train on all tokens (--data.train_on all)"
)
CHANGED = (
    "the chat template renders turn {} differently when more follows, and not as it asks for it, so its span cannot be found. "
    "Use another template (--data.chat_template FILE) or train on all tokens (--data.train_on all)"
)
OTHER = "Use another template (--data.chat_template FILE)"


@dataclass(frozen=True)
class Turn:
    """An assistant's turn that is supervised."""

    index: int
    message: Message
    before: str
    """The text when the model is asked for it."""
    after: str
    """The text that ends with it."""
    asked: str = ""
    """The content of the turn before it."""

    @cached_property
    def asks(self) -> re.Match[str] | None:
        """The reasoning, begun or empty, with which the prompt ends; its last newlines would join with what follows."""
        return ASKS.search(self.before)

    @property
    def reasoning(self) -> str:
        """What stands between <think> and </think>, or in a key of its own; "" if there is none."""
        found = next((self.message[key] for key in REASONING if self.message.get(key)), None)
        before, end, _ = self.message.get("content", "").partition(END_THINK)
        return str(found if found is not None else before.rpartition("<think>")[2] if end else "").strip()

    def check(self) -> None:
        """Raise a ValueError if the template leaves out a call of a tool, or content beside it."""
        new = self.after[common_prefix(self.after, self.before) :]
        for call in self.message.get("tool_calls", []):
            if call.get("function", call)["name"] not in new:
                raise ValueError(f"the chat template leaves out the tool_calls of turn {self.index + 1}. {OTHER}")
        content = self.message.get("content", "").rpartition(END_THINK)[2].strip()
        if content not in self.after:
            what = "that it has beside tool_calls " if self.message.get("tool_calls") else ""
            raise ValueError(
                f"the chat template leaves out the content {what}of turn {self.index + 1}, or changes it. {OTHER}"
            )

    def _after_a_changed_context(self) -> str:
        """Return what follows the end of the prompt in a text with other turns before, whose reasoning is left out, say.

        Raises:
            ValueError: the text has no such end, with the last turn of the prompt in it.
        """
        size = _common_tail(self.before, self.after)
        tail = self.before[len(self.before) - size :]
        if self.index == 0 or not self.asked or self.asked not in tail or self.after.count(tail) > 1:
            raise ValueError(FIRST if self.index == 0 else CHANGED.format(self.index + 1))
        return self.after.partition(tail)[2]

    def said(self, thinks: bool) -> tuple[str, bool]:
        """Return what the model says when it is asked, and whether that differs from what the template writes.

        Many templates write no reasoning, or ask with <think> or an empty one in front of the completion.

        Args:
            thinks: whether the template knows <think>.

        Raises:
            ValueError: it cannot be found.
        """
        said = self.after[len(self.before) :]
        is_changed = not self.after.startswith(self.before)
        if is_changed and self.asks and self.after.startswith(self.before[: self.asks.start()]):
            said = self.after[self.asks.start() :]
            said = said.partition(END_THINK)[2].lstrip("\n") if said.startswith("<think>") else said
        elif is_changed:
            said, is_changed = self._after_a_changed_context(), False
        if (self.asks and self.asks[1]) or (self.reasoning in said and not is_changed):
            return said, is_changed
        if not thinks:
            raise ValueError(
                f"the chat template leaves out the reasoning of turn {self.index + 1}. Write it into the content "
                f"(<think>...</think>), or use another template (--data.chat_template FILE)"
            )
        opening = "" if self.asks else "<think>\n"
        return opening + self.reasoning + f"\n{END_THINK}\n\n" + said.lstrip("\n"), True


def _common_tail(a: str, b: str) -> int:
    """Return the length of the longest end of `a` that stands anywhere in `b`."""
    low, high = 0, len(a)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[len(a) - middle :] in b else (low, middle - 1)
    return low


def common_prefix(a: str, b: str) -> int:
    """Return the number of characters that two texts have in common at their beginning."""
    if a.startswith(b):
        return len(b)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
