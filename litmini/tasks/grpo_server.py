"""Completions sampled by an OpenAI-compatible server that loads LoRA adapters while it runs, such as vLLM."""

from __future__ import annotations

import contextlib
import hashlib
import math
import shutil
from pathlib import Path
from typing import Any

from litmini.checkpoints.peft import save_adapter
from litmini.config.grpo import FinetuneGrpoConfig
from litmini.distributed.host_arrays import gather_on_host
from litmini.errors import UserError
from litmini.generation.rollouts import Rollout
from litmini.openai_client import Client, ServerError, ask_all


def check_server(config: FinetuneGrpoConfig) -> None:
    """Ask the sampling server, if there is one, what models it has: before anything is loaded.

    Raises:
        UserError: the address is none, or nobody answers there.
    """
    if config.sampler.base_url is not None:
        _client(config, tries=3).models()


def _client(config: FinetuneGrpoConfig, tries: int = 6) -> Client:
    sampler = config.sampler
    assert sampler.base_url is not None
    return Client(sampler.base_url, "", sampler.key_variable, sampler.timeout, tries)


class SamplingServer:
    """Gives a server the adapters of each step, and asks it for completions.

    Args:
        directory: that adapters are written to; the server reads it by the same absolute path.
        vocab_size: rows of the model.

    Raises:
        UserError: the address or the key is none.
    """

    def __init__(self, config: FinetuneGrpoConfig, directory: Path, vocab_size: int) -> None:
        self.config, self.directory, self.vocab_size = config, directory.resolve() / "sampler", vocab_size
        self.run = f"litmini-{hashlib.sha256(str(self.directory).encode()).hexdigest()[:8]}"
        self.client = _client(config)

    def update(self, fabric: Any, model: Any, step: int) -> None:
        """Let the server sample with the adapters as they are. Every rank calls this.

        Raises:
            UserError: the server does not load them.
        """
        name, before = f"{self.run}-step-{step}", self.client.model
        problem = ""
        if fabric.is_global_zero:
            target = self.directory / name
            shutil.rmtree(self.directory, ignore_errors=True)
            target.mkdir(parents=True)
            save_adapter(model, target, self.config.base, quantize=self.config.quantize)
            for old in {before, name} - {""}:  # `name` is from before this run was stopped
                with contextlib.suppress(ServerError):  # it does not have it; if there is no server, loading says so
                    self.client.tell("/unload_lora_adapter", {"lora_name": old})
            try:
                self.client.tell("/load_lora_adapter", {"lora_name": name, "lora_path": str(target)})
            except ServerError as error:
                problem = (
                    f"{error}\nThe server must load adapters while it runs, from the same files: with vLLM, "
                    f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve BASE --enable-lora --max-lora-rank RANK."
                )
        else:
            save_adapter(model, None, self.config.base)
        if problem := next(filter(None, gather_on_host(fabric, problem)), ""):
            raise UserError(problem)
        self.client.model = name

    def sample(
        self, prompts: list[list[int]], seeds: list[int], stop_ids: list[int], temperature: float
    ) -> list[Rollout]:
        """Return a completion to each prompt; arguments as for `generation.rollouts.sample`.

        Raises:
            UserError: a request failed for good; a reply lacks token ids or their log-probabilities, or has too many tokens,
                or some that the model does not have.
        """
        body = {
            "model": self.client.model,
            "max_tokens": self.config.grpo.max_completion_length,
            "temperature": temperature,
            "stop_token_ids": stop_ids,
            "logprobs": 1,
            "return_token_ids": True,
        }

        def ask(i: int) -> Rollout:
            return self._read(self.client.post("/completions", {**body, "prompt": prompts[i], "seed": seeds[i]}))

        found = dict(ask_all(ask, range(len(prompts)), self.config.sampler.concurrency))
        return [found[i] for i in range(len(prompts))]

    def _read(self, reply: dict[str, Any]) -> Rollout:
        url = self.config.sampler.base_url
        try:
            choice = reply["choices"][0]
            ids, log_probs = choice["token_ids"], (choice["logprobs"] or {})["token_logprobs"]
            finish = choice["finish_reason"]
            fits = len(ids) == len(log_probs) > 0 and all(isinstance(i, int) for i in ids)
            fits = fits and all(isinstance(value, float | int) and math.isfinite(value) for value in log_probs)
        except (KeyError, IndexError, TypeError):
            fits = False
        if not fits:
            raise UserError(
                f"{url}: the reply has no token ids with their log-probabilities (choices[0].token_ids and "
                f"logprobs.token_logprobs), which the loss needs; vLLM gives them from version 0.10.2 on."
            )
        most = self.config.grpo.max_completion_length
        if len(ids) > most:
            raise UserError(f"{url}: a completion has {len(ids)} tokens; asked for {most} at most (max_tokens).")
        if wrong := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise UserError(
                f"{url}: a completion has the token id {wrong[0]}, but the model has the rows 0 to {self.vocab_size - 1}; "
                f"expected a server with the base {self.config.base}."
            )
        return Rollout([int(i) for i in ids], [float(value) for value in log_probs], finish == "length")


def importance_weights(trained: list[float], sampled: list[float], config: FinetuneGrpoConfig) -> list[float]:
    """Return exp(trained - sampled), at most `max_weight`, of each token; for rloo of the completion, once for each token.

    Args:
        trained: log-probabilities of the same weights as the trainer computes them; `sampled`: as the server did.
    """
    differences = [t - s for t, s in zip(trained, sampled, strict=True)]
    if config.grpo.loss_type == "rloo":
        differences = [sum(differences)] * len(differences)
    most = math.log(config.sampler.max_weight)
    return [math.exp(min(difference, most)) for difference in differences]
