"""Each architecture of GGUF files: the logits of the model that a file was made from; its tokenizer, token by token."""

import copy
import itertools
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers as tf
from gguf.quants import dequantize, quantize
from gguf_files import TEXTS, randomize, tiny_llama, train_tokenizer, write_gguf
from numerics import assert_close, ulps
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

import litmini.importers.gguf.convert
from litmini.checkpoints.hf import load_model
from litmini.errors import UserError
from litmini.importers.gguf.architectures import ARCHITECTURES, Settings
from litmini.importers.gguf.convert import TYPES, import_gguf
from litmini.importers.gguf.reader import read_gguf
from litmini.tokenizer import Tokenizer as OurTokenizer

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SHAPE |= {"num_key_value_heads": 2, "max_position_embeddings": 128}
ROPE = {"rope_type": "default", "rope_theta": 5_000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 5_000.0}
GEMMA3 = {**SHAPE, "num_hidden_layers": 7, "head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 32}
LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
LOCAL = {"rope_type": "default", "rope_theta": 1e4}
KINDS = ["sliding_attention", "full_attention"]
GEMMA4 = {**SHAPE, "head_dim": 16, "global_head_dim": 32, "sliding_window": 8, "final_logit_softcapping": 30.0}
GEMMA4 |= {"layer_types": KINDS * 2, "num_hidden_layers": 4, "vocab_size_per_layer_input": 320, "pad_token_id": None}
E2B = {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2, "use_double_wide_mlp": True}
LARGE = {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 1}
EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 4, "moe_intermediate_size": 32}
CASES = {
    "qwen2": tf.Qwen2Config(**SHAPE, rope_parameters=ROPE),
    "qwen2-yarn-tied": tf.Qwen2Config(**SHAPE, rope_parameters=YARN, tie_word_embeddings=True),
    "qwen3": tf.Qwen3Config(**SHAPE, head_dim=32, rope_parameters=ROPE),
    "qwen3-tied": tf.Qwen3Config(**SHAPE, head_dim=24, rope_parameters=ROPE, tie_word_embeddings=True),
    "gemma": tf.GemmaConfig(**SHAPE, head_dim=16),
    "gemma2": tf.Gemma2Config(**SHAPE, head_dim=32, sliding_window=8, query_pre_attn_scalar=32),
    "gemma3": tf.Gemma3TextConfig(**GEMMA3),
    "gemma3-linear": tf.Gemma3TextConfig(
        **GEMMA3, rope_parameters={"full_attention": LINEAR, "sliding_attention": LOCAL}
    ),
    "gemma4-e2b": tf.Gemma4TextConfig(**GEMMA4, **E2B),
    "gemma4-26b": tf.Gemma4TextConfig(**GEMMA4, **LARGE, **EXPERTS),
    "gpt2": tf.GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4, n_positions=128, tie_word_embeddings=True),
}
SENTENCEPIECE = [
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "\n",
    "\n\n",
    "  ",
    "   ",
    "<table>",
]  # the spaces as in GGUF files


def make(case: str) -> tf.PreTrainedModel:
    return randomize(tf.AutoModelForCausalLM.from_config(copy.deepcopy(CASES[case])))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.mark.parametrize("case", CASES)
def test_logits_and_tensors_are_those_of_the_original(
    case: str, tmp_path: Path, out: Path, tokenizer: Tokenizer
) -> None:
    """Several windows long. Layout, norms, names, rotary bases and scales show in the logits."""
    theirs = make(case)
    file = write_gguf(tmp_path / "a.gguf", theirs, tokenizer, pre="gpt-2")
    import_gguf(file, out, torch.float32)
    imported, report = tf.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert imported.config.tie_word_embeddings == theirs.config.tie_word_embeddings
    expected = dict(theirs.named_parameters())
    for name, parameter in imported.named_parameters():  # 1 + weight - 1 in fp32 is off by its rounding
        torch.testing.assert_close(
            parameter, expected.pop(name), rtol=0, atol=ulps(2, scale=2.0) if "gemma" in case else 0
        )
    assert not expected
    tokens = torch.randint(0, 320, (2, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = theirs(tokens).logits
        assert logits.std() > 0.1
        if "gemma" in case:
            assert_close(imported(tokens).logits, logits)
        else:
            assert torch.equal(imported(tokens).logits, logits)
        assert_close(load_model(out, torch.float32)(tokens), logits)


def test_gpt2_is_transposed_on_disk(tmp_path: Path, out: Path, tokenizer: Tokenizer) -> None:
    """Hugging Face keeps it as (in, out), GGUF as (out, in); square ones too."""
    theirs = make("gpt2")
    import_gguf(write_gguf(tmp_path / "a.gguf", theirs, tokenizer, pre="gpt-2"), out, torch.float32)
    tensors = load_file(out / "model.safetensors")
    name = "transformer.h.0.attn.c_proj.weight"
    assert torch.equal(tensors[name], theirs.get_parameter(name)) and tensors[name].shape == (64, 64)


@pytest.mark.parametrize(("case", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemma_scales_scores_otherwise(case: str, layers: int, tmp_path: Path) -> None:
    """27B, known by its number of layers: scores are divided by the root of dim / n_heads, which files don't say."""
    theirs = make(case)
    for n_layers, expected in ((layers, 64 // 4), (layers - 1, 32)):
        theirs.config.num_hidden_layers = n_layers
        settings = Settings(*read_gguf(write_gguf(tmp_path / "a.gguf", theirs)), case)
        assert ARCHITECTURES[case].config(settings).query_scalar == expected


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_in_chunks(
    kind: str, tmp_path: Path, out: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dequantised a few rows at a time, as at once."""
    code = gguf.GGMLQuantizationType[kind]
    model = tiny_llama(320, hidden_size=256, intermediate_size=512, num_hidden_layers=1)
    weight = model.model.layers[0].mlp.down_proj.weight.detach().numpy()
    if kind in ("Q4_K", "Q5_K", "Q6_K"):  # the package reads these and writes none: random codes, sane scales
        block, size = gguf.GGML_QUANT_SIZES[code]
        raw = np.random.default_rng(0).integers(0, 255, (256, 512 // block, size), np.uint8)
        scales = slice(-2, None) if kind == "Q6_K" else slice(0, 4)
        raw[..., scales] = np.full(1 if kind == "Q6_K" else 2, 0.01, np.float16).view(np.uint8)
        raw = raw.reshape(256, -1)
    else:
        raw = quantize(weight, code)
    model.model.layers[0].mlp.down_proj = torch.nn.Identity()
    file = tmp_path / "a.gguf"
    original = gguf.GGUFWriter.write_header_to_file

    def with_the_tensor(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("blk.0.ffn_down.weight", raw, raw_dtype=code)
        original(writer)

    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", with_the_tensor)
    write_gguf(file, model, tokenizer, pre="gpt-2")
    monkeypatch.setattr(litmini.importers.gguf.convert, "CHUNK", 3 * 512)
    import_gguf(file, out, torch.float32)
    found = load_file(out / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    expected = torch.from_numpy(np.array(dequantize(raw, code), np.float32)).reshape(256, 512)
    assert torch.equal(found, expected) and expected.std() > 1e-3
    if not kind.endswith("_K"):
        torch.testing.assert_close(found, torch.from_numpy(weight), rtol=0, atol=0.1)


def test_types_outside_the_list(tmp_path: Path, out: Path, tokenizer: Tokenizer) -> None:
    raw = np.zeros((4, 84), np.uint8)
    model = tiny_llama(320)
    original = gguf.GGUFWriter.write_header_to_file

    def with_the_tensor(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("blk.0.extra.weight", raw, raw_dtype=gguf.GGMLQuantizationType.Q2_K)
        original(writer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_header_to_file", with_the_tensor)
        file = write_gguf(tmp_path / "a.gguf", model, tokenizer, pre="gpt-2")
    with pytest.raises(UserError, match=r"a\.gguf: blk\.0\.extra\.weight is Q2_K; supported types: F32, F16"):
        import_gguf(file, out)
    assert not list(out.iterdir())


def test_qwen2_words(tmp_path: Path, out: Path) -> None:
    """Digits one by one, letters composed: as in Qwen's own tokenizer."""
    pattern = tf.models.qwen2.tokenization_qwen2.PRETOKENIZE_REGEX
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    theirs = train_tokenizer(split)
    model = tiny_llama(theirs.get_vocab_size())
    import_gguf(write_gguf(tmp_path / "a.gguf", model, theirs, pre="qwen2"), out)
    ours = Tokenizer.from_file(str(out / "tokenizer.json"))
    for text in TEXTS:
        assert ours.encode(text).ids == theirs.encode(text).ids
    assert ours.encode("u\u0308").ids == theirs.encode("ü").ids


def sentencepiece_vocabulary(prefix: bool) -> tuple[list[str], list[int]]:
    """Tokens and types in the order of Gemma's: special, added, bytes, joined pieces by rank, characters."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if prefix else "never", split=False)
    corpus = [text for text in TEXTS[:3] * 3] + ["the cat sat on the mat, the rat sat  on    the cat " * 3] * 3
    trained.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    vocab = sorted(trained.get_vocab(), key=trained.get_vocab().get)
    joined = [token for token in vocab if len(token) > 1 and "\n" not in token and token.strip("\u2581")]
    letters = [token for token in vocab if len(token) == 1 and token != "\n"]
    bytes_ = [f"<0x{n:02X}>" for n in range(256)]
    tokens = SENTENCEPIECE + bytes_ + joined + letters
    return tokens, [3, 3, 3, 2] + [4] * 5 + [6] * 256 + [1] * (len(joined) + len(letters))


def plain_bpe(text: str, tokens: list[str], prefix: bool) -> list[int]:
    """Join the pair whose token is the earliest, the leftmost first, until nothing joins: as llama.cpp does."""
    ids = {token.replace(" ", "\u2581"): i for i, token in enumerate(tokens)}
    pieces = list(("\u2581" if prefix and text else "") + text.replace(" ", "\u2581"))
    while True:
        pairs = [(ids[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in ids]
        if not pairs:
            break
        _, i = min(pairs)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    found: list[int] = []
    for piece in pieces:
        found += [ids[piece]] if piece in ids else [ids[f"<0x{byte:02X}>"] for byte in piece.encode()]
    return found


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_like_tokenizer(prefix: bool, tmp_path: Path, out: Path) -> None:
    tokens, types = sentencepiece_vocabulary(prefix)
    settings = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.tokens": tokens}
    settings |= {"tokenizer.ggml.token_type": types, "tokenizer.ggml.scores": [-1000.0] * len(tokens)}
    settings |= {
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
    }
    if not prefix:
        settings["tokenizer.ggml.add_space_prefix"] = False
    import_gguf(write_gguf(tmp_path / "a.gguf", tiny_llama(len(tokens)), settings=settings), out)
    ours = OurTokenizer(out)
    assert ours.stop_ids == [1] and ours.special_ids == {0, 1, 2, 3}
    for text in [*TEXTS[:3], *TEXTS[4:6], "the cat sat on the mat", "sat  on    the", "x<table>y" * (not prefix)]:
        found = ours.encode(text, special=False)
        if "<table>" in text:
            assert found == [*plain_bpe("x", tokens, False), 8, *plain_bpe("y", tokens, False)]
        elif "\n\n" not in text:  # added tokens are taken out first
            assert found == plain_bpe(text, tokens, prefix)
        if not (prefix and "\n" in text):  # a space is put after an added token too, as in Llama's own tokenizer
            assert ours.decode(found) == text
    assert ours.encode("the cat")[0] == 2
    theirs = tf.AutoTokenizer.from_pretrained(out)
    assert theirs("the cat sat").input_ids == ours.encode("the cat sat") and theirs.bos_token == "<bos>"
    assert "\u2581\u2581" in theirs.get_vocab() and "  " not in theirs.get_vocab()


def test_tokenizer_of_gemma4(tmp_path: Path, out: Path) -> None:
    """Like SentencePiece's, with the merges that the file has, whose order is not that of tokens."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    trained.train_from_iterator(TEXTS[:3] * 3, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    special, bytes_ = ["<pad>", "<eos>", "<bos>", "<unk>"], [f"<0x{n:02X}>" for n in range(256)]
    tokens = [*special, *bytes_, *sorted(trained.get_vocab())]
    vocab = {token: i for i, token in enumerate(tokens)}
    theirs = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    theirs.normalizer = normalizers.Replace(" ", "\u2581")
    settings: dict[str, object] = {"tokenizer.ggml.model": "gemma4", "tokenizer.ggml.tokens": tokens}
    settings |= {"tokenizer.ggml.token_type": [3, 3, 3, 2] + [6] * 256 + [1] * (len(tokens) - 260)}
    settings |= {"tokenizer.ggml.merges": [" ".join(merge) for merge in merges], "tokenizer.ggml.add_bos_token": True}
    settings |= {"tokenizer.ggml.scores": [-1000.0] * len(tokens), "tokenizer.ggml.add_space_prefix": False}
    for role, number in (("bos", 2), ("eos", 1), ("unknown", 3), ("padding", 0)):
        settings[f"tokenizer.ggml.{role}_token_id"] = number
    import_gguf(write_gguf(tmp_path / "a.gguf", tiny_llama(len(tokens)), settings=settings), out)
    ours = OurTokenizer(out)
    for text in TEXTS:
        assert ours.encode(text, special=False) == theirs.encode(text).ids
        assert ours.decode(ours.encode(text, special=False)) == text
    assert ours.encode("the cat")[0] == 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"gemma4.attention.sliding_window_pattern": [True, False, False, False]}, "sliding_window_pattern"),
        ({"gemma4.feed_forward_length": [96, 96, 192, 96]}, "feed_forward_length of its layers is not implemented"),
        ({"gemma4.attention.head_count_kv": [2, 2]}, "head_count_kv has 2 numbers for 4 layers"),
        ({"gemma4.attention.head_count_kv": [2, 2, 2, 1]}, "head_count_kv of its layers is not implemented"),
        ({"gemma4.attention.logit_softcapping": 20.0}, "not implemented for GGUF architecture 'gemma4'"),
    ],
)
def test_layers_that_gemma4_has_not_are_refused(
    change: dict, message: str, tmp_path: Path, out: Path, tokenizer
) -> None:
    file = write_gguf(tmp_path / "a.gguf", make("gemma4-e2b"), tokenizer, pre="gpt-2")
    metadata, tensors = read_gguf(file)
    metadata.fields.update(change)
    with pytest.raises((UserError, ValueError), match=message):
        settings = Settings(metadata, tensors, "gemma4")
        ARCHITECTURES["gemma4"].config(settings)
        settings.refuse_the_rest()


def test_tokens_that_occur_twice(tmp_path: Path, out: Path) -> None:
    settings = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["<unk>", "a", "a"]}
    settings |= {"tokenizer.ggml.token_type": [2, 1, 1], "tokenizer.ggml.eos_token_id": 0}
    file = write_gguf(tmp_path / "a.gguf", tiny_llama(3), settings=settings)
    with pytest.raises(
        UserError, match=r"a\.gguf: its tokens and merges make no tokenizer \(of 3 tokens only 2 differ"
    ):
        import_gguf(file, out)
