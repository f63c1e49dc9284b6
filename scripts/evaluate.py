"""Evaluate a model: the perplexity of a text, exact match of completions, tasks of lm-eval; or how a reward model ranks pairs.

    python scripts/evaluate.py --checkpoint_dir checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct \
        --adapter_dir out/quickstart/final --perplexity README.md --exact_match config_hub/quickstart/heldout.jsonl

--exact_match takes a file in any format that finetuning reads; the last turn is the reference. Tasks need
pip install -e ".[lm-eval]".
"""

from dataclasses import dataclass, field
from typing import Any

from litmini.cli import command
from litmini.config.generate import ModelConfig
from litmini.errors import UserError, check


@dataclass(kw_only=True)
class EvaluateConfig(ModelConfig):
    """Settings of evaluate.py."""

    perplexity: str | None = None
    """Text file to measure perplexity on."""
    window: int = 1024
    """Tokens in one forward pass, at most the model's context."""
    stride: int | None = None
    """Tokens from one window to the next; tokens in both are counted once. By default half a window."""
    exact_match: str | None = None
    """File of prompts with their reference completions."""
    max_new_tokens: int = 64
    """Longest completion in tokens."""
    reward: str | None = None
    """File of pairs (prompt, chosen, rejected) to rank with a reward model, which measures nothing else."""
    tasks: list[str] = field(default_factory=list)
    """Tasks of lm-eval."""
    include_path: str | None = None
    """Directory of further tasks, in lm-eval's YAML."""
    fewshot: int | None = None
    """Solved examples before each prompt of a task; by default the number that the task defines."""
    limit: int | None = None
    """Maximum number of examples of each file or task."""
    batch_size: int = 16
    """Prompts in one batch."""
    out: str | None = None
    """New JSON file for the results, which are printed as well."""

    def __post_init__(self) -> None:
        others = self.perplexity is not None or self.exact_match is not None or bool(self.tasks)
        if not others and self.reward is None:
            raise UserError(
                "nothing to measure: expected --perplexity FILE, --exact_match FILE, --reward FILE or --tasks '[NAME]'."
            )
        if others and self.reward is not None:
            raise UserError("--reward takes a reward model, which has no next tokens: measure the others without it.")
        check(
            "",
            self,
            window=self.window > 1,
            stride=self.stride is None or 0 < self.stride < self.window,
            max_new_tokens=self.max_new_tokens > 0,
            limit=self.limit is None or self.limit > 0,
            fewshot=self.fewshot is None or self.fewshot >= 0,
            batch_size=self.batch_size > 0,
        )


def main(config: EvaluateConfig) -> None:
    from litmini.data.formats import read_examples
    from litmini.evaluation.metrics import exact_match, perplexity, predict
    from litmini.files import check_new_file, existing_file, write_json
    from litmini.generation.generate import open_model

    out = None if config.out is None else check_new_file(config.out, "--out")
    text = None
    if config.perplexity is not None:
        try:
            text = existing_file(config.perplexity, "text file").read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{config.perplexity} is not UTF-8 text: {error}.") from None
    results: dict[str, Any] = {}
    if config.reward is not None:
        from litmini.evaluation.rewards import rank

        results["reward"] = rank(config, config.reward, config.limit, config.batch_size)
        print(report(results))
        if out is not None:
            write_json(check_new_file(str(out), "--out"), results)
        return
    model, tokenizer = open_model(config)

    def show(name: str, found: dict[str, Any]) -> None:
        """Print a result at once: a later measurement may fail."""
        results[name] = found
        print(report({name: found}), flush=True)

    if text is not None:
        settings: Any = model.config
        window = min(config.window, settings.max_positions)
        found = perplexity(model, tokenizer, text, window, config.stride or max(1, window // 2))
        values = {"perplexity": found.perplexity, "loss": found.loss_sum / found.n_targets}
        values |= {"bits_per_byte": found.bits_per_byte, "tokens": found.n_targets}
        show("perplexity", {"file": config.perplexity, **values})
    if config.exact_match is not None:
        examples = read_examples(config.exact_match, tokenizer.chat_template is not None)[: config.limit]
        predictions = predict(model, tokenizer, examples, config.max_new_tokens, config.batch_size)
        if not predictions:
            raise UserError(f"{config.exact_match} has no prompt with a completion.")
        wrong = [vars(p) for p in predictions if not p.correct][:20]
        matched: dict[str, Any] = {
            "exact_match": exact_match(predictions),
            "examples": len(predictions),
            "wrong": wrong,
        }
        show("exact_match", {"file": config.exact_match, **matched})
    if config.tasks:
        from litmini.evaluation.lm_eval_harness import run_tasks

        limits = config.limit, config.fewshot, config.batch_size
        show("tasks", run_tasks(model, tokenizer, config.tasks, config.include_path, *limits))
    if out is not None:
        write_json(check_new_file(str(out), "--out"), results)


def report(results: dict[str, Any]) -> str:
    """Return the results as lines of text."""
    lines = []
    if p := results.get("perplexity"):
        lines.append(
            f"perplexity {p['perplexity']:.3f} (loss {p['loss']:.4f}, {p['bits_per_byte']:.4f} bits a byte) "
            f"over {p['tokens']:,} tokens of {p['file']}"
        )
    if e := results.get("exact_match"):
        lines.append(f"exact match {e['exact_match']:.1%} of {e['examples']} examples of {e['file']}")
        lines += [f"  reference  {w['reference']!r}\n  prediction {w['prediction']!r}" for w in e["wrong"][:3]]
    if r := results.get("reward"):
        low, high = r["interval"]
        lines.append(
            f"accuracy {r['accuracy']:.1%} (95% interval {low:.1%} to {high:.1%}), {r['correct']} of {r['pairs']} pairs of "
            f"{r['file']} ranked right; scores {r['chosen']:.3f} chosen, {r['rejected']:.3f} rejected"
        )
        if r["dropped"]:
            lines.append(f"  {r['dropped']} pairs are left out: equal, empty or longer than the model's context")
    for name, metrics in results.get("tasks", {}).items():
        values = [f"{key} {value:.4f}" for key, value in metrics.items() if isinstance(value, float)]
        lines.append(f"{name}: {', '.join(values)}")
    return "\n".join(lines)


if __name__ == "__main__":
    command(main, EvaluateConfig, __doc__)
