"""Fabric's loggers, which take metrics beside metrics.csv if the user asks for them."""

import importlib.util
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from litmini.errors import UserError


def check_loggers(names: Sequence[str]) -> None:
    """Raise UserError if the package of a logger (tensorboard, wandb) is missing."""
    for name in names:
        packages = ("wandb", "lightning") if name == "wandb" else (name,)
        if any(importlib.util.find_spec(package) is None for package in packages):
            raise UserError(f'--loggers {name} needs its package: pip install "litmini[{name}]"')


def make_loggers(names: Sequence[str], directory: Path, step: int) -> list[Any]:
    """Return loggers that write into a run's directory.

    Args:
        step: the step after which the run continues: TensorBoard drops later entries of a killed run.
    """
    loggers: list[Any] = []
    for name in names:
        if name == "tensorboard":
            from lightning_fabric.loggers import TensorBoardLogger

            loggers.append(TensorBoardLogger(directory, "tensorboard", version="", purge_step=step + 1))
        else:
            from lightning.pytorch.loggers import WandbLogger

            save_dir = str(directory.resolve())
            loggers.append(WandbLogger(directory.name, project="litmini", save_dir=save_dir, id=_wandb_id(directory)))
    return loggers


def _wandb_id(directory: Path) -> str:
    """Return the wandb id of a run, which is the same after resuming, so that wandb continues the run."""
    file = directory / "wandb_id"
    if not file.is_file():
        file.write_text(uuid.uuid4().hex[:12])
    return file.read_text()
