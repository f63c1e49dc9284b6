"""Examples that are in no file, tokenised as those of a file are."""

from litmini.config.finetune import DataConfig
from litmini.data.dataset import Examples, _check_dropped
from litmini.data.encode import encode_examples
from litmini.data.formats import Example, bad_records
from litmini.tokenizer import Tokenizer


def tokenize(examples: list[Example], tokenizer: Tokenizer, config: DataConfig, what: str) -> Examples:
    """Return tokens and labels; what `load_data` refuses is refused."""
    part = encode_examples(examples, tokenizer, config)
    if part.problems:
        raise bad_records(part.problems)
    _check_dropped(len(part.dropped), part.examples, part.dropped[0] if part.dropped else "", config, what)
    return Examples([(part.inputs, part.labels)], part.table, len(part.dropped), part.truncated_dropped, part.notes)
