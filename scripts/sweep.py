"""Find good settings of a training script: a grid, choices at random, or Optuna's; each run is a process of its own.

    python scripts/sweep.py finetune_lora --config my.yaml --out_dir out/sweep \\
        --grid '{optim.lr: [1e-4, 3e-4], lora.rank: [8, 16]}' --seeds '[1, 2, 3]'

--config names the settings of the runs; --sweep FILE those of the sweep itself. All settings are checked before anything runs.
A run that fails does not end the sweep. If you repeat the command, it continues: what is finished is read, what was
interrupted is resumed, and what failed is tried again. Writes OUT_DIR/sweep.md, .json and .png, and a log beside each run.
"""

from typing import Any

from litmini.cli import command
from litmini.config.sweep import SweepConfig
from litmini.config.training import RunConfig


def main(config: SweepConfig) -> None:
    import shlex
    from functools import partial
    from pathlib import Path

    from litmini.errors import UserError, counted
    from litmini.files import content_hash, existing_file, write_json, write_text
    from litmini.runs.sweep import Curves, environments, run_all, start, visible_gpus
    from litmini.runs.sweep_report import describe, plot, rows_of, table
    from litmini.system import lock
    from litmini.tasks.sweep import ROOT, Schedule, command_words, corners, read_earlier

    # 1. Every choice, checked before anything runs
    first = check_settings(config, corners(config))
    out_dir, file = Path(config.out_dir), Path(config.out_dir) / "sweep.json"
    fixed: dict[str, Any] = {"script": config.script, "set": config.set}
    fixed["settings"] = content_hash(existing_file(config.settings, "config file")) if config.settings else None
    fixed |= {name: getattr(config, name) for name in ("sampler", "space", "sampler_seed")} if config.space else {}

    # 2. What an earlier command has run
    schedule = Schedule(config, read_earlier(file, fixed, [*config.grid, *config.space]))
    out_dir.mkdir(parents=True, exist_ok=True)
    lock(out_dir)

    # 3. The runs
    environment = environments(config.jobs, first.devices, visible_gpus())
    begin = partial(_begin, out_dir, ROOT / "scripts" / f"{config.script}.py", start)
    curves = Curves(config.prune_after) if config.prune else None
    for outcome in run_all(schedule, out_dir, config.metric, environment, begin, curves):
        if outcome.status not in ("waiting", "running"):
            said = f"{outcome.value:.4f}" if outcome.value is not None else outcome.why
            print(f"{outcome.name}: {outcome.status} {said}", flush=True)
            schedule.learn(outcome.number)
        write_json(file, {"fixed": fixed, "runs": [one.as_dict() for one in schedule.outcomes]})

    # 4. What they found
    rows = rows_of(schedule.outcomes, config.maximize)
    text = table(rows, config.metric)
    write_text(out_dir / "sweep.md", text)
    plot(out_dir / "sweep.png", rows, config.metric)
    print(f"\n{describe(schedule.outcomes)}\n\n{text}")
    done = [row for row in rows if row.is_done]
    if not done:
        raise UserError(f"no choice has a result; the logs are {out_dir}/*.log. Repeat the command to try again.")
    words = command_words(config, done[0].choice, None, str(out_dir / "best"))
    best = shlex.join(["python", f"scripts/{config.script}.py", *words])
    print(f"the best, {config.metric} {done[0].mean:.4f}:\n  {best}")
    if failed := sum(one.status == "failed" for one in schedule.outcomes):
        print(f"{counted(failed, 'run')} failed; the logs are {out_dir}/*.log. Repeat the command to try again.")


def check_settings(config: SweepConfig, choices: list[dict[str, Any]]) -> RunConfig:
    """Build the settings of all choices, before anything runs; return those of the first.

    A setting that is unknown or out of range is printed, with the nearest known one, and ends the process with status 2.

    Raises:
        UserError: runs would not measure what is compared.
    """
    from litmini.cli import parse
    from litmini.config.pretrain import PretrainConfig
    from litmini.errors import UserError
    from litmini.tasks.sweep import command_words, config_class

    kind = config_class(config.script)  # from here on, errors are those of the runs' own command lines
    first: RunConfig | None = None
    for choice in choices:
        built = parse(
            kind, None, argv=command_words(config, choice, config.seeds[0] if config.seeds else None, config.out_dir)
        )
        first = first or built
    assert first is not None
    validated = isinstance(first, PretrainConfig) or first.data.val_path or first.data.val_fraction  # type: ignore[attr-defined]
    if config.metric == "val_loss" and not validated:
        raise UserError(
            "runs without validation data have no val_loss to compare: --set '{data.val_fraction: 0.05}', or another --metric."
        )
    if config.seeds and not isinstance(first, PretrainConfig) and first.data.val_fraction:  # type: ignore[attr-defined]
        print(
            "warning: with data.val_fraction, each seed validates on other examples: compare seeds with data.val_path."
        )
    if config.prune and not first.train.eval_every:
        raise UserError(
            "prune compares validation losses during training: --set '{train.eval_every: 20}', for example."
        )
    return first


def _begin(out_dir, script, start, outcome, words, environment):  # type: ignore[no-untyped-def]
    """Start a run, and say so."""
    gpus = environment.get("CUDA_VISIBLE_DEVICES")
    print(f"--- {outcome.name}" + f" on GPU {gpus}" * (gpus is not None), flush=True)
    return start(script, words, out_dir / f"{outcome.name}.log", environment)


if __name__ == "__main__":
    command(main, SweepConfig, __doc__, positional=("script",), renamed={"config": "settings", "sweep": "config"})
