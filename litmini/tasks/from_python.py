"""Finetuning from Python: adapters over a model, adapters on disk, and whole runs."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from litmini.config.classify import FinetuneClassifierConfig
from litmini.config.distill import FinetuneDistillConfig
from litmini.config.finetune import (
    FinetuneDoraConfig,
    FinetuneFullConfig,
    FinetuneIa3Config,
    FinetuneLoraConfig,
    FinetuneQloraConfig,
    Ia3Config,
    LoraConfig,
)
from litmini.config.grpo import FinetuneGrpoConfig
from litmini.config.preference import FinetunePreferenceConfig, FinetuneRewardConfig
from litmini.config.pretrain import PretrainConfig
from litmini.config.training import RunConfig
from litmini.errors import UserError
from litmini.files import read_json, write_atomically
from litmini.system import unlock_all
from litmini.tokenizer import Tokenizer

SCRIPTS: dict[type[RunConfig], str] = {
    FinetuneFullConfig: "finetune_full",
    FinetuneLoraConfig: "finetune_lora",
    FinetuneQloraConfig: "finetune_qlora",
    FinetuneDoraConfig: "finetune_dora",
    FinetuneIa3Config: "finetune_ia3",
    FinetuneClassifierConfig: "finetune_classifier",
    FinetunePreferenceConfig: "finetune_preference",
    FinetuneRewardConfig: "finetune_reward",
    FinetuneGrpoConfig: "finetune_grpo",
    FinetuneDistillConfig: "finetune_distill",
    PretrainConfig: "pretrain",
}
"""Settings of a run -> the script whose steps it takes."""


def add_adapters(
    model: nn.Module,
    method: Literal["lora", "dora", "ia3"] = "lora",
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
    rank_stabilized: bool = False,
    feedforward: Sequence[str] = ("down_proj",),
) -> list[str]:
    """Freeze `model`, and put an adapter over some of its linears; return their full names.

    The adapters' parameters, in fp32, are the only ones that require gradients. At first the model gives what it gave before.

    Args:
        model: as `litmini.load` returns it, in 16 or 4 bits.
        rank, alpha, dropout, rank_stabilized: as in the settings `--lora.*` of scripts/finetune_lora.py; not for ia3.
        targets: module names such as q_proj; by default every linear but the head, with ia3 k_proj, v_proj and down_proj.
        feedforward: for ia3, the targets whose inputs are scaled, not their outputs.

    Raises:
        UserError: a target matches nothing; lists those that exist.
    """
    if method == "ia3":
        from litmini.methods.ia3 import add_ia3

        both = [*Ia3Config().targets, *feedforward] if targets is None else list(targets)
        scaled = [name for name in feedforward if name in both]
        return add_ia3(model, Ia3Config([name for name in both if name not in scaled], scaled))
    from litmini.methods import adapters
    from litmini.methods.dora import DoRALinear

    if method not in ("lora", "dora"):
        raise UserError(f"method {method!r}; expected lora, dora or ia3.")
    names = ["all-linear"] if targets is None else list(targets)
    config = LoraConfig(rank, alpha, dropout, names, rank_stabilized=rank_stabilized)
    return adapters.add_adapters(model, config, DoRALinear if method == "dora" else None)


def save_adapter(model: nn.Module, directory: str | Path, base: str | Path, tokenizer: Tokenizer | None = None) -> Path:
    """Write the adapters of `model` as a directory in PEFT's format; return it.

    Args:
        directory: to write; must not exist.
        base: the checkpoint directory, or hub id, that the adapters belong to.
        tokenizer: written beside them, with its chat template; None: the base's is used.

    Raises:
        UserError: the directory exists, or the model has no adapters.
    """
    from litmini.checkpoints import peft
    from litmini.methods.adapters import adapters

    if not adapters(model):
        raise UserError("the model has no adapters to save: add some with litmini.add_adapters.")
    with write_atomically(Path(directory), new=True) as aside:
        peft.save_adapter(model, aside, str(base))
        if tokenizer is not None:
            tokenizer.save(aside)
    return Path(directory)


def finetune(config: RunConfig) -> Mapping[str, Any]:
    """Train as the script does that takes these settings, in this process, and return the run's results.

    The steps are those of the script itself, which is run with `config`: what it prints and writes is the same.

    Args:
        config: such as `FinetuneLoraConfig(checkpoint_dir=..., out_dir=..., data=DataConfig(path=...))`. Sizes that are
            left out are chosen, and are then set in it.

    Returns:
        The `results` of OUT_DIR/manifest.json: val_loss_before, val_loss_after, steps, samples_after and others; empty after
        a dry run.

    Raises:
        UserError: what the script would print as an error.
        Interrupted: by Ctrl-C, after a step that was saved.
    """
    name = SCRIPTS.get(type(config))
    if name is None:
        known = ", ".join(kind.__name__ for kind in SCRIPTS)
        raise UserError(f"finetune takes the settings of a script, one of {known}; found {type(config).__name__}.")
    if config.devices * config.num_nodes > 1:
        raise UserError(f"several devices need a command: python scripts/{name}.py --devices {config.devices} ...")
    file = Path(__file__).parents[2] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"litmini_script_{name}", file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise UserError(f"{file} not found: finetune needs the repository, installed by pip install -e .")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    try:
        script.main(config)
    finally:
        unlock_all()
    if config.dry_run or config.show_masks:
        return {}
    return read_json(Path(config.out_dir) / "manifest.json")["results"]  # type: ignore[no-any-return]
