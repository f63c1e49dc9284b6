"""Checkpoints of other layouts in: the tensors and logits of the originals; what is wrong is named, and nothing written."""

import base64
import itertools
import json
import random
import runpy
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from gguf_files import CORPUS, tiny_llama, train_tokenizer, write_gguf
from meta_files import meta_parts
from numerics import assert_close
from safetensors.torch import load_file, save_file
from test_architectures import SENTENCEPIECE, plain_bpe, sentencepiece_vocabulary
from tokenizers import pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from litmini.checkpoints.hf import check_checkpoint_dir, load_model
from litmini.checkpoints.safetensors_io import shards
from litmini.errors import UserError
from litmini.files import read_json
from litmini.importers.convert import convert
from litmini.importers.pickles import Pickle
from litmini.importers.vocabulary import read_sentencepiece
from litmini.tokenizer import Tokenizer

SCRIPT = Path(__file__).parents[2] / "scripts" / "convert_to_litmini.py"
TOKENS = torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return no_model(tmp_path / "source")


def no_model(directory: Path) -> Path:
    """A directory with a tokenizer."""
    directory.mkdir()
    train_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False)).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    return directory


def hf(directory: Path, model: tf.PreTrainedModel, **config) -> dict[str, torch.Tensor]:
    """Write config.json; the tensors as transformers' files hold them."""
    model.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    (directory / "config.json").write_text(json.dumps(read_json(directory / "config.json") | config))
    return tensors


def same(out: Path, tensors: dict[str, torch.Tensor]) -> None:
    found = {name: t for file in shards(out) for name, t in load_file(file).items()}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in found)


def refused(source: Path, out: Path) -> str:
    """The message; nothing is written."""
    with pytest.raises(UserError) as error:
        convert(source, out)
    assert not out.exists() and not list(out.parent.glob(f".{out.name}*"))
    return str(error.value)


@pytest.mark.parametrize("new_format", [True, False])
def test_bin(source: Path, tmp_path: Path, new_format: bool) -> None:
    """With a tied head, the buffers of old files, a dtype of its own; also of the format before torch 1.6."""
    tensors = {name: t.half() for name, t in hf(source, tiny_llama(320, tie_word_embeddings=True)).items()}
    old = {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    old["lm_head.weight"] = old["model.embed_tokens.weight"]
    torch.save(old, source / "pytorch_model.bin", _use_new_zipfile_serialization=new_format)
    out = convert(source, tmp_path / "out")
    check_checkpoint_dir(out)
    same(out, tensors)
    assert read_json(out / "config.json")["dtype"] == "float16"
    half = convert(source, tmp_path / "half", torch.bfloat16)
    same(half, {name: t.bfloat16() for name, t in tensors.items()})


def test_bin_shards(source: Path, tmp_path: Path) -> None:
    tensors = hf(source, tiny_llama(320))
    index = {name: f"pytorch_model-{i % 3 + 1:05d}-of-00003.bin" for i, name in enumerate(tensors)}
    for file in set(index.values()):
        torch.save({name: t for name, t in tensors.items() if index[name] == file}, source / file)
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    out = convert(source, tmp_path / "out", max_shard_bytes=100_000)
    assert len(shards(out)) > 1
    same(out, tensors)
    (source / "pytorch_model-00002-of-00003.bin").unlink()
    message = refused(source, tmp_path / "bad")
    assert "lacks pytorch_model-00002-of-00003.bin, which pytorch_model.bin.index.json names" in message
    index["x"] = "../x.bin"
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    assert "names a file outside its directory: ../x.bin" in refused(source, tmp_path / "bad")


class Evil:
    def __reduce__(self):
        return print, ("the pickle was run",)


def test_a_pickle_that_wants_to_run_code(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    hf(source, tiny_llama(320))
    torch.save({"x": Evil()}, source / "pytorch_model.bin")
    message = refused(source, tmp_path / "out")
    assert "pytorch_model.bin is refused: it holds more than tensors" in message and "print" in message
    assert "the pickle was run" not in capsys.readouterr().out
    torch.save({"x": 1}, source / "pytorch_model.bin")
    assert "holds no tensors by name" in refused(source, tmp_path / "out")
    torch.save({1: torch.ones(1)}, source / "pytorch_model.bin")
    assert "holds no tensors by name" in refused(source, tmp_path / "out")
    torch.save({"x": torch.eye(3).to_sparse()}, source / "pytorch_model.bin")
    assert "pytorch_model.bin: x is sparse, quantised" in refused(source, tmp_path / "out")


@pytest.mark.parametrize("kind", ["bin", "safetensors", "litgpt", "meta", "gguf"])
def test_truncated_files_are_named(kind: str, source: Path, tmp_path: Path) -> None:
    model = tiny_llama(320)
    tensors = hf(source, model)
    file = source / {"bin": "pytorch_model.bin", "litgpt": "model.pth"}.get(kind, "consolidated.00.pth")
    if kind == "safetensors":
        save_file(tensors, file := source / "model.safetensors")
    elif kind == "gguf":
        write_gguf(file := source / "a.gguf", model, None)
    else:
        torch.save(tensors, file)
    file.write_bytes(file.read_bytes()[:-5000])
    message = refused(file if kind == "gguf" else source, tmp_path / "out")
    assert file.name in message and ("truncated" in message or "damaged" in message)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 540000000\n"


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "lit_model.pth", "a.gguf", "tokenizer.json"]
)
def test_a_clone_without_lfs(name: str, source: Path, tmp_path: Path) -> None:
    """Git's few lines in place of a large file: what that is, and what to type."""
    tensors = hf(source, tiny_llama(320))
    if name == "tokenizer.json":
        save_file(tensors, source / "model.safetensors")
    (source / name).write_bytes(POINTER)
    message = refused(source / name if name == "a.gguf" else source, tmp_path / "out")
    assert f"{name} is not here: that file is only git's pointer to it" in message
    assert f"Type: git -C {source} lfs pull" in message
    if name == "model.safetensors":
        with pytest.raises(UserError, match=r"model\.safetensors is not here: .* without git-lfs"):
            load_model(source)


def test_pickled_tensors_are_read_where_they_are(source: Path, tmp_path: Path) -> None:
    """Views with strides and offsets, shared, empty and without dimensions, of other dtypes; as torch.load reads them."""
    base = torch.randn(6, 8)
    tensors = {"whole": base, "part": base[2:5, 1:], "turned": base.T, "again": base, "half": torch.rand(5).half()}
    tensors |= {
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
        "long": torch.arange(4),
        "wide": torch.ones(3, 1).expand(3, 4),
    }
    torch.save(tensors, file := source / "x.bin")
    found = Pickle(file)
    assert list(found.tensors) == list(tensors)
    for name, expected in tensors.items():
        tensor, empty = found.get(name), found.get(name, meta=True)
        assert torch.equal(tensor, expected) and tensor.dtype == empty.dtype == expected.dtype
        assert empty.is_meta and empty.shape == expected.shape


def test_a_tensor_that_is_in_two_files(source: Path, tmp_path: Path) -> None:
    tensors = hf(source, tiny_llama(320))
    for i in (1, 2):
        save_file(tensors, source / f"model-0000{i}-of-00002.safetensors")
    index = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(tensors)}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert "occurs twice: the files do not belong to one checkpoint" in refused(source, tmp_path / "out")


def test_litgpt(source: Path, tmp_path: Path) -> None:
    """Its own layout is for litgpt to convert; what that writes is read, with a head that was trained apart."""
    tensors = hf(source, tiny_llama(320, tie_word_embeddings=True))
    torch.save({"transformer.wte.weight": tensors["model.embed_tokens.weight"]}, source / "lit_model.pth")
    assert f"run this command again: litgpt convert_from_litgpt {source} {source}" in refused(source, tmp_path / "out")
    head = tensors["model.embed_tokens.weight"].clone()
    torch.save({**tensors, "lm_head.weight": head}, source / "model.pth")
    same(convert(source, tmp_path / "tied"), tensors)
    torch.save({**tensors, "lm_head.weight": head * 2}, source / "model.pth")
    out = convert(source, tmp_path / "untied")
    same(out, {**tensors, "lm_head.weight": head * 2})
    assert read_json(out / "config.json")["tie_word_embeddings"] is False


def test_header_that_claims_more_than_the_file_has(source: Path, tmp_path: Path) -> None:
    hf(source, tiny_llama(320))
    header = json.dumps({"x": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}}).encode()
    for content in (struct.pack("<Q", len(header)) + header + bytes(16), struct.pack("<Q", 2**60) + header):
        (source / "model.safetensors").write_bytes(content)
        assert "model.safetensors is damaged" in refused(source, tmp_path / "out")


def test_command_line(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Positional source, dtype and shards; a GGUF file in the dtype that is asked for."""
    model = tiny_llama(320)
    tensors = hf(source, model)
    torch.save(tensors, source / "pytorch_model.bin")
    tokenizer = train_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False))
    for i, what in enumerate((source, write_gguf(tmp_path / "a.gguf", model, tokenizer, pre="gpt-2"))):
        out = tmp_path / f"out{i}"
        words = [
            "convert_to_litmini.py",
            str(what),
            "--out_dir",
            str(out),
            "--dtype",
            "fp32",
            "--max_shard_size",
            "90KB",
        ]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as done:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        assert done.value.code == 0 and f"python scripts/verify.py {out}" in capsys.readouterr().out
        assert len(shards(out)) > 2
        same(out, tensors)


def test_what_cannot_be_converted(source: Path, tmp_path: Path) -> None:
    assert "holds no weights of a supported kind; expected a GGUF file" in refused(source, tmp_path / "out")
    assert "does not exist" in refused(tmp_path / "none", tmp_path / "out")
    assert "tokenizer.json is of no supported kind" in refused(source / "tokenizer.json", tmp_path / "out")
    tensors = hf(source, tiny_llama(320))
    tensors["extra"] = tensors.pop("model.norm.weight")
    torch.save(tensors, source / "pytorch_model.bin")
    message = refused(source, tmp_path / "out")
    assert "unexpected extra (64,)" in message and "missing model.norm.weight" in message
    tensors["model.norm.weight"] = tensors.pop("extra")
    torch.save({name: t.to(torch.int8) for name, t in tensors.items()}, source / "pytorch_model.bin")
    assert "self_attn.v_proj.weight is int8, expected floating point" in refused(source, tmp_path / "out")
    torch.save(tensors, source / "pytorch_model.bin")
    (source / "tokenizer_config.json").write_text("[1]")
    assert "tokenizer_config.json holds a JSON list" in refused(source, tmp_path / "out")
    (source / "config.json").write_text(json.dumps({"model_type": "gptj"}))
    assert "model_type 'gptj' is not implemented" in refused(source, tmp_path / "out")
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there exists already"):
        convert(source, tmp_path / "there")
    assert not list((tmp_path / "there").iterdir())


def test_a_failure_in_the_middle_leaves_nothing(source: Path, tmp_path: Path) -> None:
    tensors = hf(source, tiny_llama(320))
    torch.save(tensors, source / "pytorch_model.bin")
    (source / "tokenizer.json").unlink()
    assert "has neither tokenizer.json nor tokenizer.model" in refused(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("parts", "embedding_dim", "tied"), [(1, 0, False), (1, 0, True), (2, 1, False), (2, 0, False)]
)
def test_meta(source: Path, tmp_path: Path, parts: int, embedding_dim: int, tied: bool) -> None:
    """Llama 2 splits the embedding by columns, Llama 3 by rows."""
    rope = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    model = tiny_llama(320, rope_parameters=rope, tie_word_embeddings=tied)
    params = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": -1, "norm_eps": 1e-5}
    params |= {"multiple_of": 32, "rope_theta": 500_000.0, "use_scaled_rope": True}
    (source / "params.json").write_text(json.dumps(params))
    for i, state in enumerate(meta_parts(model, parts, embedding_dim)):
        if tied:
            state["output.weight"] = state["tok_embeddings.weight"].clone()
        torch.save(state, source / f"consolidated.{i:02d}.pth")
    out = convert(source, tmp_path / "out")
    expected = dict(model.named_parameters())
    same(out, {name: parameter.detach() for name, parameter in expected.items()})
    imported = tf.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert imported.config.tie_word_embeddings is tied and imported.config.max_position_embeddings == 131_072
    with torch.no_grad():
        assert torch.equal(imported(TOKENS).logits, model(TOKENS).logits)
    (source / "params.json").write_text("{}")
    assert "params.json does not describe a Llama (KeyError: 'dim')" in refused(source, tmp_path / "bad")


def test_metas_pairs_are_turned_as_metas_code_turns_them(source: Path, tmp_path: Path) -> None:
    """Scores of Meta's q and k under complex rotation, as in its model.py, are those of ours under half-split rotation."""
    model = tiny_llama(320, num_key_value_heads=4)
    (state,) = meta_parts(model, 1, 0)
    x, angles = torch.randn(6, 64), torch.outer(torch.arange(6), 1 / 100_000.0 ** (torch.arange(0, 16, 2) / 16))
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]

    def meta(w: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex((x @ w.T).view(6, 4, 8, 2))
        return torch.view_as_real(pairs * turns).flatten(2)

    def half(w: torch.Tensor) -> torch.Tensor:
        a, b = (x @ w.T).view(6, 4, 16).chunk(2, -1)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    attention = model.model.layers[0].self_attn
    theirs = [meta(state[f"layers.0.attention.w{k}.weight"]) for k in "qk"]
    ours = [half(attention.get_parameter(f"{k}_proj.weight").detach()) for k in "qk"]
    scores = [torch.einsum("qhd,khd->hqk", *pair) for pair in (theirs, ours)]
    assert_close(*scores)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_model(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: bool) -> None:
    """tokenizer.model alone: the token ids of SentencePiece's own rule."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    tokens, types = sentencepiece_vocabulary(prefix)
    tokens[: len(SENTENCEPIECE)] = [token.replace(" ", "\u2581") for token in SENTENCEPIECE]
    rule = {"name": "identity", "add_dummy_prefix": prefix, "remove_extra_whitespaces": False}
    model = ModelProto(normalizer_spec=rule, trainer_spec={"model_type": 2, "byte_fallback": True})
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        model.pieces.add(piece=token, score=-i, type=kind)
    if prefix:  # what follows a symbol that users defined gets no space in SentencePiece, but does in tokenizers
        (tmp_path / "symbols.model").write_bytes(model.SerializeToString())
        with pytest.raises(UserError, match="cannot be converted exactly: 'a.tb.nc"):
            read_sentencepiece(tmp_path / "symbols.model", {})
        for piece in model.pieces:
            piece.type = 1 if piece.type == 4 else piece.type
    message = model.SerializeToString()
    for file in source.iterdir():
        file.unlink()
    (source / "tokenizer.model").write_bytes(message)
    tensors = hf(source, tiny_llama(len(tokens)), eos_token_id=1)
    (source / "generation_config.json").unlink()
    torch.save(tensors, source / "pytorch_model.bin")
    tokenizer = Tokenizer(convert(source, tmp_path / "out"))
    for text in ("the cat sat on the mat", CORPUS[1], "a 你好"):
        assert tokenizer.encode(text) == [2, *plain_bpe(text, tokens, prefix)]
    assert tokenizer.stop_ids == [1]
    (source / "tokenizer.model").write_bytes(message + b"\n\xff\x01")
    assert "tokenizer.model is no SentencePiece model, or damaged" in refused(source, tmp_path / "bad")
    (source / "tokenizer.model").write_bytes(ModelProto(pieces=model.pieces).SerializeToString())
    assert "but no BPE" in refused(source, tmp_path / "bad")
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    assert 'needs sentencepiece and protobuf: pip install -e ".[convert]"' in refused(source, tmp_path / "bad")


@pytest.mark.parametrize("rule", ["identity", "nfkc", "nmt_nfkc", "nmt_nfkc_cf"])
@pytest.mark.parametrize("extra", [True, False])
def test_the_normalization_of_a_sentencepiece_model(tmp_path: Path, rule: str, extra: bool) -> None:
    """White space and characters as SentencePiece has them, on hard texts, or refused."""
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "c.txt").write_text("\n".join(["the fox jumps over the dog", "hello world", "stra\u00dfe"] * 40))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "c.txt"), model_prefix=str(tmp_path / "m"), vocab_size=300, model_type="bpe",
        byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2, hard_vocab_limit=False,
        normalization_rule_name=rule, remove_extra_whitespaces=extra,
    )  # fmt: skip
    if rule == "nmt_nfkc_cf":
        with pytest.raises(
            UserError, match="cannot be converted exactly: .* Its rule for normalization is nmt_nfkc_cf"
        ):
            read_sentencepiece(tmp_path / "m.model", {})
        return
    ours = read_sentencepiece(tmp_path / "m.model", {})
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    letters = [
        "e\u0301",
        "A\u030a",
        "s\u0323\u0307",
        "\u1112\u1161",
        *" \u00a0\u3000\t\n\r\u200b\u00ad\ufb01\uff21\uff5e\u2460",
    ]
    letters += [*"\u00c5\u2581\U0001f642\x01x  "]
    generator = random.Random(0)
    for text in ("".join(generator.choices(letters, k=generator.randrange(12))) for _ in range(300)):
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text), text


@pytest.mark.parametrize(
    "settings", [{}, {"legacy": True}, {"legacy": False}, {"legacy": None}, {"add_prefix_space": False}]
)
@pytest.mark.parametrize("added", ["added_tokens.json", "added_tokens_decoder", "both"])
def test_added_tokens_of_a_sentencepiece_model(source: Path, tmp_path: Path, settings, added) -> None:
    """Wherever they are named, and what stands after them in a text, as in transformers."""
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "c.txt"
    corpus.write_text("\n".join(["the fox jumps over the dog", "hello world", "one two three four"] * 40))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(source / "tokenizer"), vocab_size=300, model_type="bpe", byte_fallback=True,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2, hard_vocab_limit=False, normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )  # fmt: skip
    (source / "tokenizer.json").unlink()
    torch.save(hf(source, tiny_llama(320)), source / "pytorch_model.bin")
    pair = {"<|a|>": 300, "<|b|>": 301}
    base = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if added != "added_tokens_decoder":
        (source / "added_tokens.json").write_text(json.dumps(pair))
    if added != "added_tokens.json":
        flags = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
        settings = settings | {"added_tokens_decoder": {str(i): {"content": t, **flags} for t, i in pair.items()}}
    (source / "tokenizer_config.json").write_text(json.dumps({**base, "add_bos_token": True, **settings}))
    ours, theirs = Tokenizer(convert(source, tmp_path / "out")), tf.AutoTokenizer.from_pretrained(source)
    for text in ("hello <|a|>the fox<|b|>one", "<|b|> one", "the dog"):
        assert ours.encode(text) == theirs(text)["input_ids"], text
    if added == "added_tokens.json":  # with gaps between ids
        (source / "added_tokens.json").write_text(json.dumps({"<|a|>": 305, "<|b|>": 310}))
        assert Tokenizer(convert(source, tmp_path / "gaps")).encode("<|b|><|a|>")[-2:] == [310, 305]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("added_tokens.json", {"<|a|>": 7}, "has id 7, which is another token's"),
        ("added_tokens.json", {"<|a|>": "x"}, "added tokens are damaged"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"320": 5}}, "added tokens are damaged"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"320": {"special": True}}}, "added tokens are damaged"),
        ("tokenizer_config.json", {"added_tokens_decoder": ["<|a|>"]}, "added tokens are damaged"),
        ("tokenizer_config.json", {"legacy": "false"}, "legacy = 'false', expected true or false"),
    ],
)
def test_added_tokens_that_are_damaged_are_named(source: Path, tmp_path: Path, name, content, reason) -> None:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = ModelProto(normalizer_spec={"name": "identity"}, trainer_spec={"model_type": 2})
    for i in range(320):
        model.pieces.add(piece=f"<{i}>", score=-i, type=2 if i == 0 else 3)
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.model").write_bytes(model.SerializeToString())
    torch.save(hf(source, tiny_llama(320)), source / "pytorch_model.bin")
    (source / name).write_text(json.dumps(content))
    assert reason in refused(source, tmp_path / "out")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "config.json"])
@pytest.mark.parametrize(
    "content", [b"\xff" * 2**20, b"[" * 2**20, b"\n" + b"\xff" * 2**20, b'{"a":' * 2**18], ids=range(4)
)
def test_a_megabyte_of_anything_is_a_short_error(source: Path, tmp_path: Path, name, content) -> None:
    if name == "tokenizer.model":
        (source / "tokenizer.json").unlink()
    torch.save(hf(source, tiny_llama(320)), source / "pytorch_model.bin")
    (source / name).write_bytes(content)
    message = refused(source, tmp_path / "out")
    assert name in message and len(message) < 1000


def test_llama3_tokenizer_model(source: Path, tmp_path: Path) -> None:
    """Base64 and ranks: pairs are joined by rank, within words."""
    trained = train_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False))
    letters = bytes_to_unicode()
    back = {letter: byte for byte, letter in letters.items()}
    model = json.loads(trained.to_str())["model"]
    words = [t for t in sorted(model["vocab"], key=model["vocab"].get) if len(t) > 1 and not t.startswith("<|")]
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {bytes(back[c] for c in word): 256 + i for i, word in enumerate(words)}
    lines = [base64.b64encode(token) + b" " + str(rank).encode() for token, rank in ranks.items()]
    shutil.rmtree(source)
    source.mkdir()
    (source / "tokenizer.model").write_bytes(b"\n".join(lines))
    tensors = hf(source, tiny_llama(len(ranks) + 256), eos_token_id=None)
    (source / "generation_config.json").unlink()
    torch.save(tensors, source / "pytorch_model.bin")
    tokenizer = Tokenizer(convert(source, tmp_path / "out"))
    assert tokenizer.encode("<|start_header_id|>", special=False) == [len(ranks) + 6]

    def plain(word: bytes) -> list[int]:
        pieces = [word[i : i + 1] for i in range(len(word))]
        while pairs := [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in ranks]:
            i = min(pairs)[1]
            pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
        return [ranks[piece] for piece in pieces]

    expected = [
        i for word in (b"the", b" cat", b" sat", b"!", b" \xc3\xbcber", b" ", b"123", b"4") for i in plain(word)
    ]
    assert tokenizer.encode("the cat sat! über 1234") == [len(ranks), *expected]
    assert tokenizer.stop_ids == [len(ranks) + 1, len(ranks) + 9, len(ranks) + 8]
