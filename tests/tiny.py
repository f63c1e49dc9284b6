"""A tokenizer trained here, and checkpoints of `tiny` presets."""

import importlib
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from litmini.checkpoints.hf import disk_tensors, save_model
from litmini.models import FAMILIES, llama

ROOT = Path(__file__).parent.parent
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    corpus = [json.loads(line)["messages"] for line in (ROOT / "config_hub/quickstart/train.jsonl").open()]
    fast.train_from_iterator((turn["content"] for messages in corpus for turn in messages), trainer)
    fast.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    return directory


def make_tiny(directory: Path, tokenizer_dir: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    config = llama.PRESETS["tiny"]
    model = llama.Model(config)
    model.init_weights(torch.Generator().manual_seed(0))
    save_model(directory, llama.config_to_hf(config), model.state_dict().items(), side_files=tokenizer_dir)
    return directory


def make_family(model_type: str, directory: Path, tokenizer_dir: Path) -> Path:
    """A tiny checkpoint of a family."""
    module = importlib.import_module(FAMILIES[model_type])
    config = next(
        c for c in module.PRESETS.values() if c.vocab_size == 512 and module.config_to_hf(c)["model_type"] == model_type
    )
    model = module.Model(config)
    model.init_weights(torch.Generator().manual_seed(0))
    directory.mkdir()
    tensors = disk_tensors(module, config, model.state_dict().items())
    save_model(directory, module.config_to_hf(config), tensors, side_files=tokenizer_dir)
    return directory
