"""Conversations -> texts and the supervised characters of them, found by rendering a conversation up to each assistant turn.

Where that is no beginning of the whole (many templates leave out the reasoning of earlier turns), each supervised turn becomes
a text of its own, which begins as the model will be asked.
"""

import re
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice

from litmini.chat_template import REASONING, TOOLS, BadTemplate, Parts
from litmini.data.formats import Example
from litmini.errors import UserError
from litmini.literal_tokens import START
from litmini.tokenizer import Message, Tokenizer, TurnEnds

Spans = list[tuple[int, int]]
THINK, END_THINK = re.compile("</?think>"), "</think>"
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
class Rendered:
    """An example as text."""

    number: int
    """Of its record."""
    text: str
    spans: Spans
    """Supervised characters."""
    prompt: int = 0
    """So many first characters are tokenised alone, as when the model is asked; 0: all of them are tokenised at once."""


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
        new = self.after[_common_prefix(self.after, self.before) :]
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


def render_examples(
    examples: list[Example], tokenizer: Tokenizer, train_on: str, problems: list[str], notes: Counter[str]
) -> list[Rendered]:
    """Return texts and spans of examples; the faults of others are added to `problems`.

    Raises:
        BadTemplate: the template exceeds a limit; names the example.
    """
    marked = [
        replace(e, messages=tokenizer.mark(e.messages), tools=tokenizer.mark(e.tools)) if e.messages else e
        for e in examples
    ]
    talks = [e for e in marked if e.messages]
    try:
        chats = [(tokenizer.in_form(e.messages or []), e.tools or None, _parts(e, train_on)) for e in talks]
        end = tokenizer.after_completion if chats else ""
        ends = tokenizer.turn_ends if chats else TurnEnds("", "", "", "")
    except BadTemplate as error:
        raise BadTemplate(f"{talks[0].where}: {error}") from None
    texts = tokenizer.render(chats) if chats else iter(())
    rendered: list[Rendered] = []
    for number, example in enumerate(marked):
        if example.messages is None:
            prompt = tokenizer.mark(example.prompt)
            text = prompt + tokenizer.mark(example.text[len(example.prompt) :])
            rendered.append(Rendered(number, text, [] if train_on == "all" else [(len(prompt), len(text))]))
            continue
        own = islice(texts, len(_parts(example, train_on)))
        try:
            text, turns = _read_turns(example, own, train_on)
            thinks = bool(THINK.search(tokenizer.chat_template or ""))
            rendered += _find_spans(number, text, turns, (end, ends), thinks, notes)
        except BadTemplate as error:
            raise BadTemplate(f"{example.where}: {error}") from None
        except (UserError, ValueError) as error:
            problems.append(f"{example.where}: {error}")
        deque(own, 0)  # what an error left
    notes["special_tokens_as_text"] += sum(one.text.count(START) for one in rendered)
    return rendered


def _parts(example: Example, train_on: str) -> Parts:
    """Return which texts show the spans of a conversation: the whole, and those that end before and after each assistant turn.

    The whole without a turn shows whether the template knows its role: many leave out a role without a word.
    """
    messages = example.messages or []
    parts: Parts = [(len(messages), False, None)]
    parts += [(len(messages), False, TOOLS)] if example.tools else []
    for i, message in enumerate(messages):
        if message["role"] not in ("user", "assistant") and message["content"].strip():
            parts.append((len(messages), False, i))
        elif message["role"] == "assistant" and train_on != "all" and i not in example.untrained:
            parts += [(i, True, None), (i + 1, False, None)][: len(messages) - i]  # after the last turn: the whole
    return parts


def _read_turns(example: Example, texts: Iterator[str | UserError], train_on: str) -> tuple[str, list[Turn]]:
    """Return the text of a conversation and its supervised turns.

    Args:
        texts: those of `_parts`.
    """

    def take() -> str:
        text = next(texts)
        if isinstance(text, UserError):
            raise text
        return text

    text, messages = take(), example.messages or []
    if example.untrained and train_on == "all":
        raise ValueError(
            f"turn {min(example.untrained) + 1} is not to be trained, but --data.train_on all trains all tokens"
        )
    if example.tools and next(texts) == text:
        raise ValueError(f"the chat template leaves out the tools. {OTHER}")
    turns: list[Turn] = []
    for i, message in enumerate(messages):
        if message["role"] not in ("user", "assistant") and message["content"].strip():
            if next(texts) == text:
                raise ValueError(
                    f"the chat template leaves out turn {i + 1}, of the role {message['role']}. Give it a role that the "
                    f"template knows, or use another template (--data.chat_template FILE)"
                )
        elif message["role"] == "user" and message["content"].strip() not in text:
            raise ValueError(
                f"the chat template leaves out turn {i + 1}, of the role user, or changes its text. {OTHER}"
            )
        elif message["role"] == "assistant" and train_on != "all" and i not in example.untrained:
            try:
                asked = str(messages[i - 1].get("content") or "").strip() if i else ""
                turns.append(Turn(i, message, take(), take() if i + 1 < len(messages) else text, asked))
            except UserError as error:
                if i or isinstance(error, BadTemplate):
                    raise
                raise ValueError(FIRST) from None
    return text, turns


def _find_spans(
    number: int, text: str, turns: list[Turn], end: tuple[str, TurnEnds], thinks: bool, notes: Counter[str]
) -> list[Rendered]:
    """Return a conversation as one text with its spans or, where it renders differently when more follows, as one text for
    each supervised turn.

    Args:
        end: what the template puts after the completion that ends a conversation, and the tokens that end turns.
        thinks: whether the template knows reasoning.
    """
    for turn in turns:
        turn.check()
    spans = [span for turn in turns if (span := _find_span(turn, text, end))]
    if len(spans) == len(turns):
        return [_with_ends(Rendered(number, text, spans), turns, end[1])]
    alone = []
    for turn in turns:
        said, is_changed = turn.said(thinks)
        whole, start = turn.before + said, len(turn.before)
        one = Rendered(number, whole, [(start, len(whole))], start if turn.asks else 0)
        alone.append(_with_ends(one, [turn], end[1]))
        notes["rewritten_turns"] += is_changed
    return alone


def _with_ends(one: Rendered, turns: list[Turn], ends: TurnEnds) -> Rendered:
    """Return a text whose spans have what begins the next turn at their ends, where that ends turns."""
    if not ends.next_turn:
        return one
    text, spans = one.text, []
    for (start, stop), turn in zip(one.spans, turns, strict=True):
        token = ends.next_call if turn.message.get("tool_calls") else ends.next_turn
        if stop == len(text):
            text += token
        spans.append((start, stop + len(token) if text.startswith(token, stop) else stop))
    return replace(one, text=text, spans=spans)


def _find_span(turn: Turn, text: str, end: tuple[str, TurnEnds]) -> tuple[int, int] | None:
    """Return the span of a turn in the text of its conversation; None: it is not there as the model will be asked."""
    stop = _common_prefix(text, turn.after)
    last_only = len(turn.after) - stop  # some templates end the last turn in another way, after the completion
    if not text.startswith(turn.before) or stop <= len(turn.before) or last_only >= max(1, len(end[0])):
        return None
    own = end[1].turn
    if own and last_only and turn.after.rfind(own) + len(own) > stop:  # with another stop token
        return None
    if turn.asks or turn.reasoning not in text[len(turn.before) : stop]:
        return None
    return len(turn.before), stop


def _common_tail(a: str, b: str) -> int:
    """Return the length of the longest end of `a` that stands anywhere in `b`."""
    low, high = 0, len(a)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[len(a) - middle :] in b else (low, middle - 1)
    return low


def _common_prefix(a: str, b: str) -> int:
    """Return the number of characters that two texts have in common at their beginning."""
    if a.startswith(b):
        return len(b)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
