"""GGUF files of tiny models, as llama.cpp's converter writes them: metadata, names and layout checked against its output."""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import quantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
CORPUS = [
    "The cat sat on the mat in 1984, 1984 and 12345678.",
    "Über 1,234 naïve café-goers; they'll say: 'don't'!",
    "a  b\n\n\tc = d[0] + 10",
]
TEXTS = [
    *CORPUS,
    "",
    " leading and trailing ",
    "In 2024, 3.14159 × 10² ≠ 你好 🙂",
    "<|im_start|>user\nHi<|im_end|>\n<think>x</think>",
    "I'M we'll\r\n\r\n  indented 12345678",
]
ARCHITECTURES = {
    "gemma3_text": "gemma3",
    "gemma4_text": "gemma4",
}  # Hugging Face's model_type -> GGUF's name, where they differ


def train_tokenizer(split: pre_tokenizers.PreTokenizer, **options) -> Tokenizer:
    """A byte-level BPE with 3 special tokens in front and one that is added, but not special, behind."""
    tokenizer = Tokenizer(models.BPE(**options))
    # Trained on whole numbers, so that there are merges of digits which only a right split keeps from being used
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS * 3,
        trainers.BpeTrainer(vocab_size=319, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    return tokenizer


def smollm_split() -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])


def randomize(model: PreTrainedModel) -> PreTrainedModel:
    """Random weights, norms and biases away from their defaults."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        norm = "norm" in name or ".ln_" in name
        torch.nn.init.normal_(parameter.data, 1.0 if norm and name.endswith("weight") else 0.0, 0.2)
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.fill_(0.8)
    return model.eval()


def tiny_llama(vocab_size: int, **changes) -> LlamaForCausalLM:
    """A head of 16 dimensions, grouped queries."""
    settings = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5}
    settings |= {"rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0}}
    return randomize(LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **(settings | changes))))


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's convert_hf_to_gguf.py does to q and k of Llama."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def add_settings(writer: gguf.GGUFWriter, config) -> None:
    if config.model_type == "gemma4_text":
        return add_gemma4(writer, config)
    gpt2 = config.model_type == "gpt2"
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(4 * config.n_embd if gpt2 else config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    if gpt2:
        return writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    ropes = config.rope_parameters
    rope = ropes.get("full_attention", ropes)
    if "gemma" not in config.model_type or config.model_type == "gemma3_text":
        writer.add_rope_freq_base(rope["rope_theta"])
    if config.model_type == "llama":
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_vocab_size(config.vocab_size)
    elif config.model_type != "qwen2":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if config.model_type in ("gemma2", "gemma3_text"):
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def add_gemma4(writer: gguf.GGUFWriter, config) -> None:
    """What is another value, or a list, in place of the settings of Gemma 3."""
    types, n_layers = config.layer_types, config.num_hidden_layers
    full, local = (config.per_layer_config[types.index(f"{kind}_attention")] for kind in ("full", "sliding"))
    writer.add_block_count(n_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_sliding_window(config.sliding_window)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
    writer.add_float32("gemma4.rope.freq_base_swa", config.rope_parameters["sliding_attention"]["rope_theta"])
    writer.add_shared_kv_layers(config.num_kv_shared_layers)
    writer.add_embedding_length_per_layer_input(config.hidden_size_per_layer_input)
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in types])
    for add, kind in ((writer.add_key_length, full), (writer.add_value_length, full)):
        add(kind.head_dim)
    for add in (writer.add_key_length_swa, writer.add_value_length_swa, writer.add_rope_dimension_count_swa):
        add(local.head_dim)
    writer.add_rope_dimension_count(full.head_dim)
    wide = [1 + (config.use_double_wide_mlp and mode == "reuse") for mode in config.kv_sharing_modes]
    widths = [config.intermediate_size * factor for factor in wide]
    writer.add_feed_forward_length(widths if config.use_double_wide_mlp else widths[0])
    heads = [full if kind == "full_attention" else local for kind in types]
    counts = [one.num_key_value_heads for one in heads]
    writer.add_head_count_kv(counts if len(set(counts)) > 1 else counts[0])
    if config.enable_moe_block:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.top_k_experts)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    rotated = int(full.head_dim * config.rope_parameters["full_attention"]["partial_rotary_factor"] / 2)
    divisors = [1.0] * rotated + [1e30] * (full.head_dim // 2 - rotated)
    writer.add_tensor("rope_freqs.weight", np.array(divisors, dtype=np.float32))


def add_bpe(writer: gguf.GGUFWriter, tokenizer: Tokenizer, pre: str) -> None:
    vocab, added = tokenizer.get_vocab(), tokenizer.get_added_tokens_decoder()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(sorted(vocab, key=lambda token: vocab[token]))
    writer.add_token_types([(3 if added[i].special else 4) if i in added else 1 for i in range(len(vocab))])
    writer.add_token_merges([" ".join(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]])
    for name, token in (("bos", 1), ("eos", 2), ("unknown", 0), ("padding", 2)):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    writer.add_chat_template(TEMPLATE)


def hf_tensors(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """The tensors as a file has them, under Hugging Face's names."""
    tensors = {}
    for name, parameter in model.named_parameters():
        array = parameter.detach().float().numpy()
        if model.config.model_type == "llama" and (found := [k for k in ("q_proj", "k_proj") if f".{k}." in name]):
            q = found == ["q_proj"]
            array = permute(array, model.config.num_attention_heads if q else model.config.num_key_value_heads)
        elif model.config.model_type == "gpt2" and name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight")):
            array = np.ascontiguousarray(array.T)
        elif model.config.model_type in ("gemma", "gemma2", "gemma3_text") and name.endswith("norm.weight"):
            array = array + 1
        tensors[name] = array
    return gemma4_names(model, tensors) if model.config.model_type == "gemma4_text" else tensors


def gemma4_names(model: PreTrainedModel, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What has no `.weight` gets one, or the name that the converter gives it; keys that no layer uses are there, too."""
    scalars = {name: b for name, b in model.named_buffers() if name.endswith("layer_scalar")}
    named = {f"{name}.weight": scalar.numpy() for name, scalar in scalars.items()}
    for name, array in tensors.items():
        layer = name.partition("layers.")[2].partition(".")[0]
        scales = {"router.scale": "ffn_gate_inp", "router.per_expert_scale": "ffn_down_exps"}
        scale = next((new for end, new in scales.items() if name.endswith(end)), None)
        named[f"blk.{layer}.{scale}.scale" if scale else name + ".weight" * (".experts." in name)] = array
    modes = model.config.kv_sharing_modes
    unused = [f"blk.{i}.attn_k.weight" for i, mode in enumerate(modes) if mode == "reuse"]
    return named | {name: np.ones((4, 64), dtype=np.float32) for name in unused}


def write_gguf(
    file: Path,
    model: PreTrainedModel,
    tokenizer: Tokenizer | None = None,
    architecture: str | None = None,
    pre: str = "smollm",
    quantized: gguf.GGMLQuantizationType | None = None,
    settings: dict[str, object] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    """A GGUF file as llama.cpp's converter writes it. `settings` and `tensors` add to it."""
    kind = model.config.model_type
    architecture = architecture or ARCHITECTURES.get(kind, kind)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_string("general.organization", "acme")
    add_settings(writer, model.config)
    if tokenizer is not None:
        add_bpe(writer, tokenizer, pre)
    for key, value in (settings or {}).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[list] = writer.add_array
        add[type(value)](key, value)
    writer.data_alignment = (settings or {}).get("general.alignment", writer.data_alignment)
    real = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == ARCHITECTURES.get(kind, kind))
    names = gguf.get_tensor_name_map(real, model.config.num_hidden_layers)
    for name, array in hf_tensors(model).items():
        old = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        if quantized is not None and array.ndim == 2:
            writer.add_tensor(old, quantize(array, quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(old, array)
    for old, array in (tensors or {}).items():
        writer.add_tensor(old, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
