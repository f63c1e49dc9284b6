"""Tasks of EleutherAI's lm-eval on a model that is in memory (the `lm-eval` extra)."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from litmini.config.generate import SamplingConfig
from litmini.errors import UserError
from litmini.generation.batch import check_ids
from litmini.generation.generate import finish_all
from litmini.generation.request import Request
from litmini.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lm_eval.api.model import LM


def run_tasks(
    model: nn.Module,
    tokenizer: Tokenizer,
    tasks: list[str],
    include_path: str | None,
    limit: int | None,
    fewshot: int | None,
    batch_size: int,
) -> dict[str, Any]:
    """Return results by task, as lm-eval gives them.

    Args:
        tasks: names of lm-eval's own tasks, or of those in YAML files below `include_path`.
        limit: examples of each task; None: all.
        fewshot: solved examples before each prompt; None: as many as the task says.

    Raises:
        UserError: lm-eval is not installed, or there is no such task.
    """
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f'tasks need {error.name}: pip install -e ".[lm-eval]"') from None
    manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
    if any(name not in manager.all_tasks for name in tasks):  # reading lm-eval's own thousands takes a while
        manager = TaskManager(include_path=include_path)
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        raise UserError(
            f"no task {', '.join(unknown)}; those in {include_path or 'lm-eval'} are known by their YAML files."
        )
    evaluated = simple_evaluate(
        make_lm(model, tokenizer, batch_size),
        tasks=tasks,
        num_fewshot=fewshot,
        limit=limit,
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=False,
    )
    return evaluated["results"]


def make_lm(model: nn.Module, tokenizer: Tokenizer, batch_size: int) -> "LM":
    """Wrap the model for lm-eval: log-likelihoods of continuations, and completions that end at given texts."""
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM

    config: Any = model.config
    bos, eos = tokenizer.special_id("bos_token"), tokenizer.special_id("eos_token")
    end = tokenizer.stop_ids[0] if eos is None else eos

    class LitminiLM(TemplateLM):
        @property
        def eot_token_id(self) -> int:
            return end

        @property
        def prefix_token_id(self) -> int:
            return end if bos is None else bos

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
            framed = bos is not None and string.startswith(tokenizer.decode([bos], skip_special=False))
            return tokenizer.encode(string, special=not framed if add_special_tokens is None else add_special_tokens)

        def _loglikelihood_tokens(self, requests: list[Any], **options: Any) -> list[tuple[float, bool]]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
            results: dict[int, tuple[float, bool]] = {}
            for start in range(0, len(order), batch_size):
                part = order[start : start + batch_size]
                results |= zip(part, log_likelihoods(model, [pairs[i] for i in part]), strict=True)
            return [results[i] for i in range(len(pairs))]

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            sums = []
            for request in requests:
                windows = utils.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=config.max_positions,
                    context_len=1,
                )
                parts = [(None, *utils.make_disjoint_window(window)) for window in windows]
                sums.append(sum(value for value, _ in self._loglikelihood_tokens(parts)))
            return sums

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            sequences = []
            for request in requests:
                context, settings = request.args
                stop = settings.get("until") or []
                max_new_tokens = settings.get("max_gen_toks", 256)
                sampling = SamplingConfig(
                    max_new_tokens=max_new_tokens,
                    temperature=settings.get("temperature", 0.0) if settings.get("do_sample") else 0.0,
                    top_p=settings.get("top_p") if settings.get("do_sample") else None,
                    stop=[stop] if isinstance(stop, str) else list(stop),
                )
                ids = self.tok_encode(context)[-max(1, config.max_positions - max_new_tokens) :]  # its end
                sequences.append(Request(ids, sampling, [end], tokenizer))
            for start in range(0, len(sequences), batch_size):
                finish_all(model, sequences[start : start + batch_size])
            return [sequence.text for sequence in sequences]

    return LitminiLM()


@torch.inference_mode()
def log_likelihoods(model: nn.Module, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """Return for each (context, continuation) its summed log-probability, and whether greedy decoding gives it."""
    config: Any = model.config
    device = next(model.parameters()).device
    rows = [(context + continuation)[-(config.max_positions + 1) :][:-1] for context, continuation in pairs]
    for context, continuation in pairs:
        check_ids(context + continuation, config.vocab_size)
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    positions = torch.arange(longest, device=device).expand_as(tokens)
    lengths = torch.tensor([[len(row)] for row in rows], device=device)
    logits = model(tokens, positions, (positions < lengths).long())  # padding is a document of its own
    results = []
    for (_, continuation), row, length in zip(pairs, logits, lengths.flatten().tolist(), strict=True):
        targets = torch.tensor(continuation[-length:], device=device)
        logs = row[length - len(targets) : length].float().log_softmax(-1)  # (targets, vocab)
        total = logs.gather(1, targets[:, None]).sum()
        results.append((float(total), bool((logs.argmax(-1) == targets).all())))
    return results
