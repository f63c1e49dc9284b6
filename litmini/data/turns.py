"""Conversations -> texts and the supervised characters of them, found by rendering a conversation up to each assistant turn.

Where that is no beginning of the whole (many templates leave out the reasoning of earlier turns), each supervised turn becomes
a text of its own, which begins as the model will be asked.
"""

import re
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

from litmini.data.formats import Example
from litmini.data.turn import FIRST, OTHER, Turn, common_prefix
from litmini.errors import UserError
from litmini.literal_tokens import START
from litmini.templates.render import TOOLS, BadTemplate, Parts
from litmini.tokenizer import Tokenizer, TurnEnds

Spans = list[tuple[int, int]]
THINK = re.compile("</?think>")


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
        chats = [(tokenizer.template.in_form(e.messages or []), e.tools or None, _parts(e, train_on)) for e in talks]
        end = tokenizer.template.after_completion if chats else ""
        ends = tokenizer.turn_ends if chats else TurnEnds("", "", "", "")
    except BadTemplate as error:
        raise BadTemplate(f"{talks[0].where}: {error}") from None
    texts = tokenizer.template.render(chats) if chats else iter(())
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
    stop = common_prefix(text, turn.after)
    last_only = len(turn.after) - stop  # some templates end the last turn in another way, after the completion
    if not text.startswith(turn.before) or stop <= len(turn.before) or last_only >= max(1, len(end[0])):
        return None
    own = end[1].turn
    if own and last_only and turn.after.rfind(own) + len(own) > stop:  # with another stop token
        return None
    if turn.asks or turn.reasoning not in text[len(turn.before) : stop]:
        return None
    return len(turn.before), stop
