"""Where metrics go beside metrics.csv, through Fabric's loggers: only where the user asks for it."""

from pathlib import Path
from typing import Any

from litmini.config import UserError


def make_loggers(names: list[Any], directory: Path, step: int) -> list[Any]:
    """Loggers that write into a run's directory.

    Args:
        names: tensorboard, wandb.
        step: after which the run goes on: TensorBoard leaves out what a killed run logged after it.

    Raises:
        UserError: a logger's package is missing.
    """
    loggers: list[Any] = []
    for name in names:
        try:
            if name == "tensorboard":
                from lightning.fabric.loggers import TensorBoardLogger

                loggers.append(TensorBoardLogger(directory, "tensorboard", version="", purge_step=step + 1))
            else:
                import wandb  # noqa: F401  # the logger itself says so only when it is used
                from lightning.pytorch.loggers import WandbLogger

                place = str(directory.resolve())
                loggers.append(WandbLogger(directory.name, project="litmini", save_dir=place, id=_wandb_id(directory)))
        except ImportError:
            raise UserError(f'--loggers {name} needs its package: pip install "litmini[{name}]"') from None
    return loggers


def _wandb_id(directory: Path) -> str:
    """The same for a resumed run, so that it goes on there, too."""
    import uuid

    file = directory / "wandb_id"
    if not file.is_file():
        file.write_text(uuid.uuid4().hex[:12])
    return file.read_text()
