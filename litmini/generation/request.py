"""One reply in the making: its tokens, the text that is fit to be shown, and where it ends."""

from typing import Literal

import torch
from torch import Tensor

from litmini.config.generate import SamplingConfig
from litmini.generation.sampling import Logprobs, choose, log_probabilities
from litmini.tokenizer import Tokenizer


class TextStream:
    """Token ids -> text as they come: never half a character, and never the beginning of what may be a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: list[str]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.text = ""  # fit to be shown
        self.stopped = False
        self._held = ""  # may become a stop string
        self._ids: list[int] = []  # the last ones: those that are text already, then those that are not
        self._done = 0

    def push(self, token: int) -> None:
        self._ids.append(token)
        before, now = self._decode(self._ids[: self._done]), self._decode(self._ids)
        if not now.endswith("\ufffd"):  # else bytes of a character are still to come
            self._ids, self._done = self._ids[self._done :], len(self._ids) - self._done
            self._show(now[len(before) :])

    def finish(self) -> None:
        """Show what was held back, now that nothing more comes."""
        if self.stopped:
            return
        before, now = self._decode(self._ids[: self._done]), self._decode(self._ids)
        self._show(now[len(before) :])
        self.text += self._held
        self._held = ""

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids) if ids else ""

    def _show(self, piece: str) -> None:
        if self.stopped:
            return
        self._held += piece
        found = [at for at in map(self._held.find, self.stop) if at >= 0]
        if found:
            self.text += self._held[: min(found)]
            self._held, self.stopped = "", True
            return
        longest = len(self._held)
        starts = (n for s in self.stop for n in range(min(len(s) - 1, longest), 0, -1) if self._held.endswith(s[:n]))
        keep = len(self._held) - max(starts, default=0)
        self.text, self._held = self.text + self._held[:keep], self._held[keep:]


class Request:
    """What is being said to one prompt.

    Args:
        prompt: token ids.
        stop_ids: it ends at any of these, which are no part of it.
        tokenizer: makes text of it; needed for stop strings. None: token ids only.
        adapter: name of an adapter in the batch's bank; None: the bare base.
    """

    def __init__(
        self,
        prompt: list[int],
        sampling: SamplingConfig,
        stop_ids: list[int],
        tokenizer: Tokenizer | None = None,
        adapter: str | None = None,
    ) -> None:
        self.prompt, self.sampling, self.adapter = prompt, sampling, adapter
        self.stop_ids = [] if sampling.ignore_eos else stop_ids
        self.tokens = list(prompt)
        self.logprobs: list[Logprobs] = []
        self.finish: Literal["stop", "length"] | None = None
        self.room = sampling.max_new_tokens  # `Batch.add` takes what the model's context leaves
        self.generator: torch.Generator | None = None
        self._text = TextStream(tokenizer, sampling.stop) if tokenizer else None
        self._taken = 0

    @property
    def ids(self) -> list[int]:
        """The answer's token ids."""
        return self.tokens[len(self.prompt) :]

    @property
    def text(self) -> str:
        """All text so far that is fit to be shown."""
        assert self._text is not None, "this answer has no tokenizer"
        return self._text.text

    def take(self) -> str:
        """The text since the last call."""
        text = self.text
        piece, self._taken = text[self._taken :], len(text)
        return piece

    def choose(self, logits: Tensor) -> int | None:
        """Add the next token, chosen from fp32 logits (vocab,), and return it; None if the answer ends without it."""
        token = choose(logits, self.sampling, self.tokens, self.generator)
        if token in self.stop_ids:
            self.end("stop")
            return None
        self.tokens.append(token)
        if self.sampling.logprobs is not None:
            self.logprobs.append(log_probabilities(logits, token, self.sampling.logprobs))
        if self._text is not None:
            self._text.push(token)
            if self._text.stopped:
                self.end("stop")
        if self.finish is None and len(self.tokens) - len(self.prompt) >= self.room:
            self.end("length")
        return token

    def end(self, why: Literal["stop", "length"]) -> None:
        """Nothing more is said."""
        self.finish = why
        if self._text is not None:
            self._text.finish()
            if self._text.stopped:  # the last bytes completed a stop string
                self.finish = "stop"
