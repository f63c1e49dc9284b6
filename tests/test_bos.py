"""BOS once, or not at all: for every family of the registry, a tokenizer directory as its published checkpoints have it."""

import json
from pathlib import Path

import pytest
import torch
from tokenized import tokenize
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

import litmini
from litmini.checkpoints.config import disk_tensors
from litmini.checkpoints.export import export
from litmini.checkpoints.hf import load_model, save_model
from litmini.checkpoints.peft import save_adapter
from litmini.config.finetune import DataConfig, LoraConfig
from litmini.data.formats import Example
from litmini.methods.adapters import add_adapters
from litmini.models import FAMILIES, family
from litmini.tokenizer import Tokenizer

ASKED = [{"role": "user", "content": "Two large mugs to Oslo, please."}]
CHAT = [*ASKED, {"role": "assistant", "content": "mug, two, L, Oslo"}]
LONGER = [*CHAT, {"role": "user", "content": "And seven rugs."}, {"role": "assistant", "content": "rug, seven"}]
RAW = "Once upon a time"
MODULES = {name.rsplit(".", 1)[-1]: model_type for model_type, name in reversed(FAMILIES.items())}

ANSWER = "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
TAGS = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}" + ANSWER
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = (  # Llama 2 begins every question with BOS
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
TEKKEN = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
HARMONY = (  # published, answers before the last end with <|end|>: how such turns are trained is tested with templates
    "{% for m in messages %}{{ '<|start|>' + m.role }}{% if m.role == 'assistant' %}{{ '<|channel|>final' }}{% endif %}"
    "{{ '<|message|>' + m.content }}"
    "{{ '<|return|>' if m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
HEADERS = (
    "{% for m in messages %}"
    "{% set c = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set c = bos_token + c %}{% endif %}{{ c }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
TURNS = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
TURNS4 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<turn|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|turn>model\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

GRANITE = (
    "{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)

END = "<|endoftext|>"
NO_BOS = {"bos_token": END, "eos_token": END}
S = {"add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>", "legacy": False}
GEMMA = {"add_bos_token": True, "bos_token": "<bos>", "eos_token": "<eos>", "tokenizer_class": "GemmaTokenizer"}
QWEN = {"add_bos_token": False, "bos_token": None, "eos_token": "<|im_end|>", "tokenizer_class": "Qwen2Tokenizer"}
R1 = {
    "add_bos_token": True,
    "bos_token": "<｜begin｜>",
    "eos_token": "<｜end｜>",
    "tokenizer_class": "LlamaTokenizerFast",
}

# Family and checkpoints -> tokenizer_config.json, chat template, further special tokens, and whether BOS is before a
# conversation and before raw text
STYLES = {
    "deepseek_v3": (R1, "{{ bos_token }}" + TAGS, "", True, True),
    "falcon 7b": (NO_BOS, None, "", False, False),
    "gemma": (GEMMA, TURNS, "<start_of_turn> <end_of_turn>", True, True),
    "gemma2": (GEMMA, TURNS, "<start_of_turn> <end_of_turn>", True, True),
    "gemma3": (GEMMA, TURNS, "<start_of_turn> <end_of_turn>", True, True),
    "gemma4": (GEMMA, TURNS4, "<|turn> <turn|>", True, True),
    "gpt2": ({"tokenizer_class": "GPT2Tokenizer", "eos_token": END, "bos_token": END}, None, "", False, False),
    "gpt_oss": (
        {"bos_token": "<|startoftext|>", "eos_token": "<|return|>"},
        HARMONY,
        "<|start|> <|message|> <|channel|> <|end|>",
        False,
        False,
    ),
    "gpt_neox pythia": (
        {**NO_BOS, "tokenizer_class": "GPTNeoXTokenizer", "add_bos_token": False},
        None,
        "",
        False,
        False,
    ),
    "granite_hybrid": (
        {"bos_token": "<|end_of_text|>", "eos_token": "<|end_of_text|>", "tokenizer_class": "GPT2Tokenizer"},
        GRANITE,
        "<|start_of_role|> <|end_of_role|>",
        False,
        False,
    ),
    "lfm2": (
        {"bos_token": "<|startoftext|>", "eos_token": "<|im_end|>"},
        "{{ bos_token }}" + CHATML,
        "<|im_start|> <|im_end|>",
        True,
        True,
    ),
    "llama 2": ({**S, "tokenizer_class": "LlamaTokenizer"}, INST, "", True, True),
    "llama 3": (
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        HEADERS,
        "<|start_header_id|> <|end_header_id|>",
        True,
        True,
    ),
    "llama mistral": ({**S, "tokenizer_class": "LlamaTokenizer"}, MISTRAL, "", True, True),
    "llama tinyllama": ({**S, "tokenizer_class": "LlamaTokenizer"}, TAGS, "", False, True),
    "llama smollm2": ({**NO_BOS, "eos_token": "<|im_end|>"}, CHATML, "<|im_start|> <|im_end|>", False, False),
    "mamba2": (
        {**NO_BOS, "tokenizer_class": "GPTNeoXTokenizer", "add_bos_token": False},
        None,
        "",
        False,
        False,
    ),
    "ministral3": ({"bos_token": "<s>", "eos_token": "</s>"}, TEKKEN, "[INST] [/INST]", True, True),
    "mixtral": ({**S, "tokenizer_class": "LlamaTokenizer"}, MISTRAL, "", True, True),
    "mpt chat": ({**NO_BOS, "tokenizer_class": "GPTNeoXTokenizer"}, CHATML, "<|im_start|> <|im_end|>", False, False),
    "olmo2": ({**NO_BOS, "tokenizer_class": "GPT2Tokenizer"}, "{{ bos_token }}" + TAGS, "", True, False),
    "phi 2": ({**NO_BOS, "tokenizer_class": "CodeGenTokenizer"}, None, "", False, False),
    "phi3": (
        {**S, "add_bos_token": False, "eos_token": END, "tokenizer_class": "LlamaTokenizer"},
        PHI3,
        "<|end|> <|user|> <|assistant|>",
        False,
        False,
    ),
    "phi3 phi-4": ({**NO_BOS, "tokenizer_class": "GPT2Tokenizer"}, CHATML, "<|im_start|> <|im_end|>", False, False),
    "qwen2": (QWEN, CHATML, f"<|im_start|> {END}", False, False),
    "qwen2 deepseek-r1": (R1, "{{ bos_token }}" + TAGS, "", True, True),
    "qwen3": (QWEN, CHATML, f"<|im_start|> {END}", False, False),
    "qwen3_5": (QWEN, CHATML, f"<|im_start|> {END}", False, False),
    "qwen3_5_moe": (QWEN, CHATML, f"<|im_start|> {END}", False, False),
    "qwen3_moe": (QWEN, CHATML, f"<|im_start|> {END}", False, False),
    "smollm3": ({"bos_token": None, "eos_token": "<|im_end|>"}, CHATML, "<|im_start|> <|end_of_text|>", False, False),
}


def tokenizer_files(directory: Path, settings: dict, template: str | None, more: str, frames: bool) -> None:
    """A BPE of 512 tokens, like SentencePiece's where the published one is, else on bytes."""
    piece = settings.get("tokenizer_class") in ("LlamaTokenizer", "GemmaTokenizer")
    special = [t for t in ("<unk>", settings.get("bos_token"), settings["eos_token"], *more.split()) if t]
    fast = FastTokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True) if piece else models.BPE())
    if settings.get("tokenizer_class") == "GemmaTokenizer":
        fast.normalizer = normalizers.Replace(" ", "▁")
    elif piece:
        fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.decoder = decoders.ByteLevel()
    bytes_ = [f"<0x{i:02X}>" for i in range(256)] if piece else []
    alphabet = [] if piece else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=special + bytes_, initial_alphabet=alphabet)
    words = " ".join(m["content"] for m in LONGER).split()
    fast.train_from_iterator([*words, *(f" {word}" for word in words)], trainer)
    last = processors.ByteLevel(trim_offsets=False)
    if frames:
        bos = settings["bos_token"]
        add = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, fast.token_to_id(bos))])
        last = add if piece else processors.Sequence([last, add])
    if frames or not piece:
        fast.post_processor = last
    fast.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    if template is not None:
        settings["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(params=STYLES)
def style(request, tmp_path):
    """(the checkpoint of a family's tiny preset with a tokenizer, template, BOS in a conversation, BOS before text)"""
    settings, template, more, in_chat, in_text = STYLES[request.param]
    module = family(MODULES[request.param.split()[0]])
    model = module.Model(module.PRESETS["tiny"])
    model.init_weights(torch.Generator().manual_seed(0))
    (tmp_path / "base").mkdir()
    tokenizer_files(tmp_path / "base", settings, template, more, in_text)
    tensors = disk_tensors(module, model.config, [(n, p.detach()) for n, p in model.named_parameters()])
    save_model(tmp_path / "base", module.config_to_hf(model.config), tensors)
    return tmp_path / "base", template, in_chat, in_text


def test_every_family_has_a_style():
    assert {name.split()[0] for name in STYLES} == set(MODULES)


def trained(tokenizer: Tokenizer, **example) -> list[int]:
    """The tokens that finetuning sees: all but the last one, which is only predicted."""
    data = tokenize([Example("a:1", **example)], tokenizer, DataConfig("", max_seq_len=4096), "training")
    return [token for i in range(len(data)) for token in data[i][0].tolist()]


def test_bos_once_or_not_at_all(style, tmp_path):
    """In training, in generation, and in both again from the adapter and from what was merged."""
    base, template, in_chat, in_text = style
    first = Tokenizer(base)
    reference = AutoTokenizer.from_pretrained(base)
    bos = first.fast.token_to_id(first.settings.get("bos_token") or "")

    def check(ids: list[int], expected: list[int], there: bool) -> None:
        assert ids == expected
        assert next(i for i, token in enumerate(ids) if token != bos) == there, "BOS at the start"

    model = load_model(base, torch.float32)
    add_adapters(model, LoraConfig(rank=2))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_adapter(model, adapter, str(base))
    first.save(adapter)
    export(base, tmp_path / "merged", adapter)
    for directory in (base, adapter, tmp_path / "merged"):
        theirs = AutoTokenizer.from_pretrained(directory)
        for text in (RAW, f" {RAW}\n", ""):
            assert (
                Tokenizer(directory, "none").encode_prompt(text) == reference(text).input_ids == theirs(text).input_ids
            )
        raw = Tokenizer(directory, "none")
        check(raw.encode_prompt(RAW), reference(RAW).input_ids, in_text)
        check(trained(raw, text=RAW), reference(RAW).input_ids, in_text)
        if template is None:
            continue
        ours = Tokenizer(directory)
        for messages in (CHAT, LONGER):
            expected = reference.apply_chat_template(messages)["input_ids"]
            assert theirs.apply_chat_template(messages)["input_ids"] == expected
            check(trained(ours, messages=messages), expected[:-1], in_chat)
            prompt = reference.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
            check(ours.encode_prompt(messages[:-1]), prompt, in_chat)
        assert ours.encode_prompt(ASKED[0]["content"]) == ours.encode_prompt(ASKED)
        check(trained(ours, text=RAW), reference(RAW).input_ids, in_text)
    assert litmini.load(base, adapter)[1].encode(RAW) == reference(RAW).input_ids
