"""One request: its tokens, the text that can be shown so far, and where it ends."""

from typing import Literal

import torch
from torch import Tensor

from litmini.config.generate import SamplingConfig
from litmini.generation.sampling import Logprobs, log_probabilities
from litmini.generation.token_bytes import token_bytes, token_text
from litmini.tokenizer import Tokenizer


class TextStream:
    """Text of a stream of token ids: never half a character, and never the beginning of what may be a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: list[str]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.text = ""  # that can be shown
        self.stopped = False
        self._pending = ""  # may become a stop string
        self._ids: list[int] = []  # the last ones: those in the text, then those that are not yet
        self._shown = 0

    def push(self, token: int) -> int:
        """Add a token, and return the place of its first character in the text; of the character that it is part of."""
        self._ids.append(token)
        before, now = self._decode(self._ids[: self._shown]), self._decode(self._ids)
        offset = len(self.text) + len(self._pending)  # without bytes of a character that is not complete
        if len(self._ids) > self._shown + 1:  # after bytes, which may turn out to be no character
            own = token_text(token_bytes(self.tokenizer, token))
            offset += max(0, len(now) - len(before) - len(own)) if now.endswith(own) else 0
        if not now.endswith("\ufffd"):  # else bytes of a character are still to come
            self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
            self._show(now[len(before) :])
        return offset

    def finish(self) -> None:
        """Show the rest, after the last token."""
        if self.stopped:
            return
        before, now = self._decode(self._ids[: self._shown]), self._decode(self._ids)
        self._show(now[len(before) :])
        self.text += self._pending
        self._pending = ""

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids) if ids else ""

    def _show(self, piece: str) -> None:
        if self.stopped:
            return
        self._pending += piece
        if found := [at for at in map(self._pending.find, self.stop) if at >= 0]:
            self.text += self._pending[: min(found)]
            self._pending, self.stopped = "", True
            return
        longest = len(self._pending)
        starts = (n for s in self.stop for n in range(min(len(s) - 1, longest), 0, -1) if self._pending.endswith(s[:n]))
        keep = len(self._pending) - max(starts, default=0)
        self.text, self._pending = self.text + self._pending[:keep], self._pending[keep:]


class Request:
    """One prompt and its completion.

    Args:
        prompt: token ids.
        stop_ids: the completion ends before any of these.
        tokenizer: for text and stop strings; None: token ids only.
        adapter: name of an adapter of the batch's multi-LoRA; None: the base model.
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
        self.logprobs: list[Logprobs] = []  # those not taken
        self.finish: Literal["stop", "length", "error"] | None = None
        self.error: Exception | None = None
        self.max_new_tokens = sampling.max_new_tokens  # `Batch.add` limits it to the model's context
        self.generator: torch.Generator | None = None
        self._text = TextStream(tokenizer, sampling.stop) if tokenizer else None
        self._taken = 0

    @property
    def wants_logits(self) -> bool:
        """Whether `push` reads the logits of each token."""
        return self.sampling.logprobs is not None

    @property
    def ids(self) -> list[int]:
        """Token ids of the completion."""
        return self.tokens[len(self.prompt) :]

    @property
    def remaining_tokens(self) -> int:
        """Tokens that may still follow."""
        return self.max_new_tokens - len(self.ids)

    @property
    def text(self) -> str:
        """Text of the completion so far."""
        assert self._text is not None, "this request has no tokenizer"
        return self._text.text

    def take(self) -> str:
        """Return the text since the last call."""
        text = self.text
        piece, self._taken = text[self._taken :], len(text)
        return piece

    def take_logprobs(self) -> list[Logprobs]:
        """Return the log-probabilities since the last call, and forget them. Another thread may add to them meanwhile."""
        taken = self.logprobs[:]
        del self.logprobs[: len(taken)]
        return taken

    def push(self, token: int, logits: Tensor) -> None:
        """Add the next token, or end at a stop token.

        Args:
            logits: (vocab,) fp32, from which it was chosen, for the log-probabilities.
        """
        if token in self.stop_ids:
            return self.end("stop")
        self.tokens.append(token)
        offset = 0 if self._text is None else self._text.push(token)
        if self.sampling.logprobs is not None:
            self.logprobs.append(log_probabilities(logits, token, self.sampling.logprobs, offset))
        if self._text is not None and self._text.stopped:
            self.end("stop")
        if self.finish is None and self.remaining_tokens <= 0:
            self.end("length")

    def fail(self, error: Exception) -> None:
        """End the completion with an error, which is this request's and not its neighbours'."""
        self.finish, self.error = "error", error

    def end(self, why: Literal["stop", "length"]) -> None:
        """End the completion."""
        self.finish = why
        if self._text is not None:
            self._text.finish()
            if self._text.stopped:  # the last bytes completed a stop string
                self.finish = "stop"
