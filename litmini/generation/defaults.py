"""Sampling settings of a checkpoint: those that its `generation_config.json` recommends."""

from pathlib import Path

from litmini.config.generate import SamplingConfig
from litmini.errors import UserError
from litmini.files import read_json

SAMPLED = ("temperature", "top_k", "top_p", "min_p")  # transformers uses them with do_sample only


def sampling_defaults(*directories: str | Path) -> SamplingConfig:
    """Return the settings of the first `generation_config.json` in these directories; greedy where it does not sample.

    As transformers reads it: without `do_sample` it is greedy; with it, temperature is 1 unless the file has another.

    Raises:
        UserError: a value is out of range, or no number.
    """
    file = next((f for f in (Path(d) / "generation_config.json" for d in directories) if f.is_file()), None)
    if file is None:
        return SamplingConfig()
    raw = {key: value for key, value in read_json(file).items() if value is not None}
    found = {"repetition_penalty": raw.get("repetition_penalty", 1.0)}
    if raw.get("do_sample"):
        found |= {"temperature": 1.0, **{key: raw[key] for key in SAMPLED if key in raw}}
    if found.get("top_k") == 0:  # transformers: all tokens
        del found["top_k"]
    try:
        return SamplingConfig(**found)
    except (UserError, TypeError) as error:
        raise UserError(f"{file}: {error}") from None


def describe_sampling(sampling: SamplingConfig) -> str:
    """Return settings of sampling that are not neutral, in a few words."""
    if sampling.temperature == 0:
        return "greedy" + (
            f", repetition_penalty {sampling.repetition_penalty:g}" if sampling.repetition_penalty != 1 else ""
        )
    neutral = SamplingConfig()
    named = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    values = {name: getattr(sampling, name) for name in named}
    return ", ".join(f"{name} {value:g}" for name, value in values.items() if value != getattr(neutral, name))
