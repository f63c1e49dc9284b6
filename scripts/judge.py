"""Judge which of two models answers better: by a model behind an OpenAI-compatible endpoint, or by a reward model.

    python scripts/generate.py --checkpoint_dir out/NAME/final --prompts questions.jsonl --out a.jsonl
    python scripts/generate.py --checkpoint_dir checkpoints/ORG/NAME --prompts questions.jsonl --out b.jsonl
    python scripts/judge.py --a a.jsonl --b b.jsonl --out_dir out/judged --judge.base_url http://127.0.0.1:8000/v1

Each pair is judged in both orders. OUT_DIR/verdicts.jsonl has all that was asked and said, OUT_DIR/results.json what it comes
to. If you repeat the command, it continues with the missing verdicts. The key is that of the environment variable
OPENAI_API_KEY, or of the one that --judge.key_variable names.
"""

import math
from dataclasses import dataclass, field

from litmini.cli import command
from litmini.config.judge import JudgeConfig
from litmini.errors import UserError, check


@dataclass(kw_only=True)
class JudgePairsConfig:
    """Settings of judge.py."""

    a: str
    """File of answers of one model, as generate.py writes it: a line has prompt or messages, and answer."""
    b: str
    """File of answers of the other one to the same prompts."""
    out_dir: str
    """Directory of verdicts and results; the same command continues there."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    reward_model: str | None = None
    """Instead of an endpoint: the directory of a reward model from finetune_reward.py."""
    checkpoint_dir: str | None = None
    """Base of a reward model that is an adapter. None: the base that adapter_config.json names."""
    tie_margin: float = 0.0
    """Scores of a reward model that differ by no more than this are a tie."""
    human: str | None = None
    """File of what people say of the same prompts, to compare with: lines of prompt or messages, and winner (a, b or tie)."""
    write_pairs: str | None = None
    """New JSONL file for the pairs with a winner, as preference data: prompt, chosen and rejected."""
    limit: int | None = None
    """Judge the first pairs only."""
    device: str = "auto"
    """Device of a reward model. auto: a GPU if there is one, else the CPU."""

    def __post_init__(self) -> None:
        if (self.judge.base_url is None) == (self.reward_model is None):
            raise UserError("expected either --judge.base_url URL or --reward_model DIRECTORY.")
        check(
            "",
            self,
            tie_margin=0 <= self.tie_margin < math.inf,
            limit=self.limit is None or self.limit > 0,
            out_dir=bool(self.out_dir),
        )


def main(config: JudgePairsConfig) -> None:
    import json
    from pathlib import Path

    from tqdm import tqdm

    from litmini.errors import counted
    from litmini.evaluation.answers import read_human, read_pairs
    from litmini.evaluation.judge import LLMJudge, RewardJudge
    from litmini.evaluation.verdicts import VerdictFile, describe, preferences, summarize
    from litmini.files import check_new_file, content_hash, write_json, write_text
    from litmini.generation.generate import usable_device

    # 1. The answers, and what people say of them
    pairs, alone = read_pairs(config.a, config.b, config.limit)
    print(f"{counted(len(pairs), 'pair')} of answers" + f"; {counted(alone, 'answer')} without a partner" * bool(alone))
    human = read_human(config.human, pairs) if config.human is not None else None
    new_pairs = None if config.write_pairs is None else check_new_file(config.write_pairs, "--write_pairs")

    # 2. The judge
    judge: LLMJudge | RewardJudge
    if config.reward_model is not None:
        device = usable_device(config.device)
        judge = RewardJudge(config.reward_model, config.checkpoint_dir, device, config.tie_margin)
    else:
        judge = LLMJudge(config.judge)

    # 3. Its verdicts, those that are missing
    hashes = {name: content_hash(Path(getattr(config, name))) for name in ("a", "b")}
    file = VerdictFile(Path(config.out_dir), {**hashes, **judge.settings})
    wanted = file.missing(pairs, judge.orders)
    total = len(pairs) * len(judge.orders)
    try:
        with tqdm(desc="judging", unit="verdict", total=total, initial=total - len(wanted), disable=None) as bar:
            for verdict in judge.judge(wanted):
                file.add(verdict)
                bar.update()
    finally:
        file.close()

    # 4. What they come to
    numbers = {pair.number for pair in pairs}
    verdicts = [one for one in file.verdicts if one.pair in numbers]
    summary = summarize(pairs, verdicts, human)
    print(describe(summary, (config.a, config.b)))
    write_json(
        Path(config.out_dir) / "results.json", {"a": config.a, "b": config.b, **judge.settings, "results": summary}
    )
    if new_pairs is not None:
        records = preferences(pairs, verdicts)
        write_text(new_pairs, "".join(json.dumps(record) + "\n" for record in records))
        print(f"written: {new_pairs}, {counted(len(records), 'pair')} for scripts/finetune_preference.py")
    if judge.failures:
        raise UserError(
            f"{counted(len(judge.failures), 'verdict')} missing (the first: {judge.failures[0]}). All others are kept: repeat "
            f"the command to ask for these again."
        )
    if not summary["judged"]:
        replies = [one.reply for one in verdicts if one.winner is None]
        raise UserError(
            f"the judge named no winner in any of its replies; the first: {replies[0][:200]!r}. Give "
            f"it more --judge.max_tokens, or name another --judge.model or --judge.prompt, with another --out_dir."
        )


if __name__ == "__main__":
    command(main, JudgePairsConfig, __doc__)
