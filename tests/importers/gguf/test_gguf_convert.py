"""GGUF import: weights, settings and tokenizer are those of the model that the file was made from."""

import json
import math
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from gguf_files import TEXTS, smollm_split, tiny_llama, train_tokenizer, write_gguf
from numerics import assert_close
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from litmini.checkpoints.hf import check_checkpoint_dir, load_model
from litmini.errors import UserError
from litmini.importers.gguf.convert import import_gguf
from litmini.importers.gguf.reader import read_gguf


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(smollm_split())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, {}, {"attention_bias": True, "mlp_bias": True}])
def test_logits_are_those_of_the_original(tmp_path: Path, out: Path, tokenizer: Tokenizer, changes: dict) -> None:
    model = tiny_llama(tokenizer.get_vocab_size(), **changes)
    facts = import_gguf(write_gguf(tmp_path / "a.gguf", model, tokenizer), out, torch.float32)
    assert facts["main_type"] == "F32" and facts["bits"] == 32 and facts["organization"] == "acme"
    check_checkpoint_dir(out)
    tokens = torch.randint(0, model.config.vocab_size, (2, 50), generator=torch.Generator().manual_seed(1))
    imported = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert imported.config.tie_word_embeddings is model.config.tie_word_embeddings
    with torch.no_grad():
        expected = model(tokens).logits
        assert torch.equal(imported(tokens).logits, expected)
        assert_close(load_model(out, torch.float32)(tokens), expected)


def test_quantised_weights_and_facts(tmp_path: Path, out: Path, tokenizer: Tokenizer) -> None:
    model = tiny_llama(tokenizer.get_vocab_size())
    kind = gguf.GGMLQuantizationType.Q4_1
    facts = import_gguf(write_gguf(tmp_path / "a.gguf", model, tokenizer, quantized=kind), out)
    assert facts["quantization"] == {"Q4_1": 16, "F32": 5} and (facts["main_type"], facts["bits"]) == ("Q4_1", 4)
    original = model.model.layers[1].mlp.down_proj.weight.detach().numpy()
    expected = torch.from_numpy(dequantize(quantize(original, kind), kind)).bfloat16()
    tensors = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert torch.equal(tensors["model.layers.1.mlp.down_proj.weight"], expected)


def test_metadata_and_tensors_are_those_of_the_packages_reader(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Every field, of every type, and every tensor's numbers."""
    settings: dict[str, object] = {"a.bool": True, "a.int": 7, "a.float": 1e-5, "a.text": "ü", "a.list": [1.5, -2.0]}
    settings |= {
        "a.words": ["x", "", "你好"],
        "a.numbers": [3, 2**20],
        "a.flags": [True, False],
        "general.alignment": 4096,
    }
    kind = gguf.GGMLQuantizationType.Q5_1
    model = tiny_llama(tokenizer.get_vocab_size())
    file = write_gguf(tmp_path / "a.gguf", model, tokenizer, quantized=kind, settings=settings)
    theirs, (metadata, tensors) = gguf.GGUFReader(file), read_gguf(file)
    fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    found = {key: v.tolist() if isinstance(v, np.ndarray) else v for key, v in metadata.fields.items()}
    assert found == fields and metadata.get("a.float") == 1e-5 != found["a.float"]
    assert list(tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        ours = tensors[tensor.name]
        assert (ours.kind, ours.nbytes, ours.shape) == (tensor.tensor_type, tensor.n_bytes, tuple(tensor.shape[::-1]))
        rows = ours.nbytes // ours.row_bytes
        assert np.array_equal(ours.read(0, rows).ravel(), dequantize(tensor.data, tensor.tensor_type).ravel())
        assert np.array_equal(ours.read(rows - 1, rows), ours.read(0, rows)[-1:])


def test_settings_lose_the_noise_of_fp32(tmp_path: Path, out: Path, tokenizer: Tokenizer) -> None:
    import_gguf(write_gguf(tmp_path / "a.gguf", tiny_llama(tokenizer.get_vocab_size()), tokenizer), out)
    config = json.loads((out / "config.json").read_text())
    assert (config["rms_norm_eps"], config["rope_theta"], config["dtype"]) == (1e-5, 100_000.0, "bfloat16")
    assert json.loads((out / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }


def test_every_stop_token_is_kept(tmp_path: Path, out: Path, tokenizer: Tokenizer) -> None:
    settings = {"tokenizer.ggml.eot_token_id": 0}
    file = write_gguf(tmp_path / "a.gguf", tiny_llama(tokenizer.get_vocab_size()), tokenizer, settings=settings)
    import_gguf(file, out)
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


def test_rotary_scaling(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """llama3 as transformers computes it is recognised by its divisors; anything else is refused, not ignored."""
    rope = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    model = tiny_llama(tokenizer.get_vocab_size(), rope_parameters=rope)
    plain = 1 / 500_000.0 ** (torch.arange(0, 16, 2) / 16)
    divisors = (plain / model.model.rotary_emb.inv_freq).numpy().astype(np.float32)
    assert 1 < divisors[-2] <= divisors[-1] == 8
    for name, factors in (("good", divisors), ("bad", divisors * np.linspace(1, 2, 8, dtype=np.float32))):
        write_gguf(tmp_path / f"{name}.gguf", model, tokenizer, tensors={"rope_freqs.weight": factors})
        (tmp_path / name).mkdir()
    import_gguf(tmp_path / "good.gguf", tmp_path / "good", torch.float32)
    assert json.loads((tmp_path / "good" / "config.json").read_text())["rope_parameters"] == rope
    tokens = torch.arange(60)[None]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "good", dtype=torch.float32)(tokens).logits
        assert torch.equal(logits, model(tokens).logits)
    with pytest.raises(UserError, match=r"bad\.gguf: rope_freqs\.weight is not Llama 3's"):
        import_gguf(tmp_path / "bad.gguf", tmp_path / "bad")


@pytest.mark.parametrize("add_bos", [False, True])
def test_tokenizer_is_equal(tmp_path: Path, out: Path, tokenizer: Tokenizer, add_bos: bool) -> None:
    settings = {"tokenizer.ggml.add_bos_token": add_bos}
    file = write_gguf(tmp_path / "a.gguf", tiny_llama(tokenizer.get_vocab_size()), tokenizer, settings=settings)
    import_gguf(file, out)
    same_tokens(Tokenizer.from_file(str(out / "tokenizer.json")), tokenizer, bos=[1] if add_bos else [])
    automatic = AutoTokenizer.from_pretrained(out)
    for text in TEXTS:
        assert automatic(text).input_ids == [1] * add_bos + tokenizer.encode(text, add_special_tokens=False).ids
    names = (automatic.bos_token, automatic.eos_token, automatic.unk_token, automatic.pad_token)
    assert names == ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_end|>")
    chat = automatic.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nHi<|im_end|>\n"


def same_tokens(ours: Tokenizer, theirs: Tokenizer, bos: list[int] = []) -> None:  # noqa: B006
    assert ours.get_vocab() == theirs.get_vocab()
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special_tokens=False).ids == ids
        assert ours.encode(text).ids == bos + ids
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.encode("a", "b").ids == [*bos, *theirs.encode("a").ids, *bos, *theirs.encode("b").ids]


def test_gpt2_and_llama3_words(tmp_path: Path) -> None:
    """The splits as transformers has them; Llama 3 adds BOS even where the file is silent, as llama.cpp does."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    pattern = TikTokenConverter(vocab_file="").pattern  # this is Llama 3's
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    llama3 = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    for pre, split, bos in (("gpt-2", gpt2, []), ("llama-bpe", llama3, [1])):
        trained = train_tokenizer(split, ignore_merges=pre == "llama-bpe")
        file = write_gguf(tmp_path / f"{pre}.gguf", tiny_llama(trained.get_vocab_size()), trained, pre=pre)
        (tmp_path / pre).mkdir()
        import_gguf(file, tmp_path / pre)
        imported = Tokenizer.from_file(str(tmp_path / pre / "tokenizer.json"))
        same_tokens(imported, trained, bos)
        assert isinstance(imported.post_processor, processors.TemplateProcessing) == bool(bos)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gptj"}, r"GGUF architecture 'gptj' is not supported; supported are: llama, qwen2"),
        (
            {"pre": "default"},
            r"pre-tokenizer 'default' is not supported; supported are: gpt-2, smollm, llama-bpe, qwen2",
        ),
        ({"settings": {"llama.expert_count": 8}}, r"not implemented .*llama\.expert_count = 8"),
        ({"settings": {"llama.attention.sliding_window": 64}}, r"not implemented .*sliding_window = 64"),
        ({"settings": {"llama.rope.scaling.type": "yarn"}}, r"not implemented .*scaling\.type = 'yarn'"),
        ({"settings": {"llama.attention.key_length": 32}}, r"not implemented .*rope\.dimension_count = 16"),
        ({"settings": {"tokenizer.ggml.add_space_prefix": True}}, r"add_space_prefix = True is not supported"),
        ({"tensors": {"blk.0.attn_rot.weight": np.ones(4, np.float32)}}, r"do not fit.*\n.*blk\.0\.attn_rot\.weight"),
    ],
)
def test_what_is_not_understood_is_refused(
    tmp_path: Path, out: Path, tokenizer: Tokenizer, changes: dict, message: str
) -> None:
    file = write_gguf(tmp_path / "a.gguf", tiny_llama(tokenizer.get_vocab_size()), tokenizer, **changes)
    with pytest.raises(UserError, match=message) as error:
        import_gguf(file, out)
    assert str(file) in str(error.value)
    assert not list(out.iterdir()), "nothing may be written before the file is known to be understood"


def test_missing_and_misshapen_tensors_come_in_one_error(tmp_path: Path, out: Path, tokenizer: Tokenizer) -> None:
    model = tiny_llama(tokenizer.get_vocab_size())
    model.model.norm = torch.nn.Identity()
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 96, bias=False)
    file = write_gguf(tmp_path / "a.gguf", model, tokenizer)
    with pytest.raises(UserError) as error:
        import_gguf(file, out)
    assert "model.norm.weight is missing" in str(error.value)
    assert "up_proj.weight has shape (96, 32), the metadata implies (96, 64)" in str(error.value)


def test_damaged_files(tmp_path: Path, out: Path, tokenizer: Tokenizer) -> None:
    """Cut anywhere, empty, or no GGUF at all: an error that names the file."""
    whole = write_gguf(tmp_path / "whole.gguf", tiny_llama(tokenizer.get_vocab_size()), tokenizer).read_bytes()
    damaged = [whole[:n] for n in (0, 3, 10, 30, 200, 5_000, 20_000, len(whole) // 2, len(whole) - 100)]
    for content in [*damaged, b"PK\x03\x04" + whole[4:], whole[:24] + b"\xff" * 200 + whole[224:]]:
        file = tmp_path / "bad.gguf"
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.gguf is truncated, damaged or no GGUF file"):
            import_gguf(file, out)
    with pytest.raises(UserError, match=r"GGUF file not found: .*none\.gguf"):
        import_gguf(tmp_path / "none.gguf", out)


@pytest.mark.parametrize(
    ("settings", "reason"),
    {
        "not causal": ({"llama.attention.causal": False}, "llama.attention.causal = False"),
        "layers": ({"llama.block_count": 2**31}, r"llama.block_count is 2,147,483,648; expected above 0, to 10,000"),
        "no heads": ({"llama.attention.head_count": 0}, "head_count is 0"),
        "text": ({"llama.context_length": "256"}, "context_length is '256'; expected one int"),
        "true": ({"llama.context_length": True}, "context_length is True; expected one int"),
        "NaN": ({"llama.attention.layer_norm_rms_epsilon": math.nan}, "epsilon is nan"),
        "base as text": ({"llama.rope.freq_base": "10000"}, "freq_base is '10000'; expected one float"),
        "keys as list": ({"llama.attention.head_count_kv": [2, 2]}, r"head_count_kv is \[2, 2\]; expected one int"),
        "end as text": ({"tokenizer.ggml.eos_token_id": "2"}, "eos_token_id is '2'; expected one int"),
        "add as text": ({"tokenizer.ggml.add_bos_token": "false"}, "add_bos_token is 'false'; expected one bool"),
        "types as number": ({"tokenizer.ggml.token_type": 1}, "token_type is 1; expected one list"),
        "template as number": ({"tokenizer.chat_template": 5}, "chat_template is 5; expected one str"),
        "prefix as text": ({"tokenizer.ggml.add_space_prefix": "no"}, "add_space_prefix is 'no'"),
    }.values(),
)
def test_settings_of_another_type_or_size_are_named(tmp_path, out, tokenizer, settings, reason) -> None:
    model = tiny_llama(tokenizer.get_vocab_size())
    file = write_gguf(tmp_path / "a.gguf", model, tokenizer, settings=settings)
    with pytest.raises(UserError, match=reason):
        import_gguf(file, out)


@pytest.mark.parametrize("at", [8, 16, "tokens", "dimensions"])
@pytest.mark.parametrize("count", [2**31, 2**63, 10**7])
def test_counts_that_no_file_can_hold(tmp_path, out, tokenizer, at, count) -> None:
    """Of tensors, settings, strings in a list, dimensions; in a sparse file that would have the bytes for some of them."""
    file = write_gguf(tmp_path / "a.gguf", tiny_llama(tokenizer.get_vocab_size()), tokenizer)
    content = bytearray(file.read_bytes())
    if at == "tokens":
        at = content.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8
    elif at == "dimensions":
        at, count = content.index(b"token_embd.weight") + len(b"token_embd.weight"), min(count, 2**32 - 1)
    size = 4 if count < 2**32 and content[at - 1 : at] == b"t" else 8
    content[at : at + size] = count.to_bytes(size, "little")
    file.write_bytes(content)
    for sparse in (0, 2**36):
        if sparse:
            with file.open("r+b") as opened:
                opened.truncate(sparse)
        with pytest.raises(UserError, match=r"a\.gguf is truncated, damaged or no GGUF file"):
            import_gguf(file, out)


@pytest.mark.real
def test_smollm2_reads_english(smollm2: Path) -> None:
    """The real import. Perplexity of the paragraph: 21.5; with q and k left in llama.cpp's order it is 81.1."""
    text = (
        "The lighthouse stood at the end of a narrow road that followed the coast for several miles. Every evening, "
        "shortly before sunset, the keeper climbed the stairs, lit the lamp, and wrote a few lines about the weather "
        "in a large book. In winter the wind was so strong that he had to hold on to the railing, and in summer the "
        "tourists came to take pictures of the sea and ask him whether he ever felt lonely. He always answered that "
        "he had never had the time."
    )
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tokens = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(tokens[0]) == text
    with torch.no_grad():
        perplexity = model(tokens, labels=tokens).loss.exp().item()
    assert perplexity < 30
    assert tokenizer.tokenize("in 1984") == ["in", "Ġ", "1", "9", "8", "4"]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert prompt.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    answer = tokenizer("The capital of France is Paris.<|im_end|>").input_ids
    tokens = torch.tensor([tokenizer(prompt).input_ids + answer])
    with torch.no_grad():  # one pass over the whole answer shows what greedy decoding says
        assert model(tokens).logits[0, -len(answer) - 1 : -1].argmax(-1).tolist() == answer
