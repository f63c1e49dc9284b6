"""Where metrics go beside metrics.csv, through the loggers that Fabric has: only where the user asks for it."""

import importlib.util
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from litmini.errors import UserError


def check_loggers(names: Sequence[str]) -> None:
    """Raise UserError where a package of a logger (tensorboard, wandb) is missing."""
    for name in names:
        packages = ("wandb", "lightning") if name == "wandb" else (name,)
        if any(importlib.util.find_spec(package) is None for package in packages):
            raise UserError(f'--loggers {name} needs its package: pip install "litmini[{name}]"')


def make_loggers(names: Sequence[str], directory: Path, step: int) -> list[Any]:
    """Loggers that write into a run's directory.

    Args:
        step: after which the run goes on: TensorBoard leaves out what a killed run logged after it.
    """
    loggers: list[Any] = []
    for name in names:
        if name == "tensorboard":
            from lightning_fabric.loggers import TensorBoardLogger

            loggers.append(TensorBoardLogger(directory, "tensorboard", version="", purge_step=step + 1))
        else:
            from lightning.pytorch.loggers import WandbLogger

            place = str(directory.resolve())
            loggers.append(WandbLogger(directory.name, project="litmini", save_dir=place, id=_wandb_id(directory)))
    return loggers


def _wandb_id(directory: Path) -> str:
    """The same for a resumed run, so that it goes on there, too."""
    file = directory / "wandb_id"
    if not file.is_file():
        file.write_text(uuid.uuid4().hex[:12])
    return file.read_text()
