"""What preference learning measures beside its loss: the share of generated completions that match, and the trap of DPO."""

import re
from typing import Any

from litmini.system import time_limit
from litmini.tasks.setup import TrainingSetup


def measure_matches(setup: TrainingSetup, when: str) -> None:
    """Complete all validation prompts and write to the manifest which share of the completions matches `eval.matches`.

    Do nothing without such an expression, or before the training of a run that is resumed.
    """
    config: Any = setup.recorder.config.eval
    if config.matches is None or not setup.data.val_examples or (when == "before" and setup.progress.step):
        return
    predictions = setup.predict(setup.data.val_examples)
    matching = [match(config.matches, one.prediction.strip()) for one in predictions]
    setup.recorder.write_manifest(**{f"matches_{when}": sum(matching) / len(matching)})


def match(pattern: str, text: str) -> bool:
    """Return whether all of a text matches a regular expression.

    Raises:
        UserError: it takes too long.
    """
    with time_limit(1, f"the pattern {pattern!r} takes more than a second on {text!r:.80}; expected a simpler one."):
        return re.search(pattern, text) is not None


def warn_of_falling(setup: TrainingSetup) -> None:
    """Print a warning if chosen completions became less probable: the loss falls as well if rejected ones fall faster."""
    results = setup.recorder.results
    before, after = (results.get(f"logp_chosen_{when}") for when in ("before", "after"))
    if before is not None and after is not None and after < before - 0.005 * abs(before):  # more than rounding
        setup.fabric.print(
            f"warning: chosen completions of the validation data became less probable: log p {before:.1f} -> {after:.1f}. The "
            f"model moved away from rejected ones faster, possibly to something else than chosen ones: look at its "
            f"completions. A higher --preference.beta, a lower --optim.lr or --preference.sft_weight 1 holds it back."
        )
