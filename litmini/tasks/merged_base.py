"""The base of a run that starts from an adapter merged into another base."""

from pathlib import Path
from typing import Any

from litmini.checkpoints.export import export
from litmini.checkpoints.model_card import resolve, write_card
from litmini.errors import UserError
from litmini.files import discard, read_json, write_json
from litmini.runs.manifest import weights_hash

FILE = "merged.json"


def write_merged_base(config: Any) -> None:
    """Write `checkpoint_dir` with `starts_from` merged in to `OUT_DIR/base`; a resumed run finds it there.

    Args:
        config: a `FinetuneConfig` whose `starts_from` is the adapter.

    Raises:
        UserError: something else is there, or the adapter does not fit.
    """
    base = Path(config.base)
    sources = {"base": weights_hash(Path(config.checkpoint_dir)), "adapter": weights_hash(Path(config.starts_from))}
    if base.exists():
        if (base / FILE).is_file() and read_json(base / FILE) == sources:
            return
        raise UserError(
            f"{base} exists and is not this base with this adapter; move it away, or choose another --out_dir."
        )
    part = base.with_name("base.part")  # a run that was killed here leaves it, and the next one begins again
    if part.exists():
        discard(part)
    export(config.checkpoint_dir, part, config.starts_from)
    write_card(resolve(config.checkpoint_dir, config.starts_from), part, "base", adapter_kept=False)
    write_json(part / FILE, sources)
    part.rename(base)
