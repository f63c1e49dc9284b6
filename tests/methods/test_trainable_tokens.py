"""New tokens: rows of embedding and head that start as the mean and are trained alone; against PEFT and transformers."""

import json
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from numerics import assert_close, assert_gradients_close
from safetensors.torch import load_file, save_file
from test_methods import changed

import litmini
from litmini.checkpoints.export import export
from litmini.checkpoints.extend import extend_vocabulary
from litmini.checkpoints.hf import load_model, save_model, save_trained
from litmini.checkpoints.peft import load_adapter, read_adapter, save_adapter
from litmini.config.finetune import LoraConfig, QuantizeConfig
from litmini.errors import UserError
from litmini.generation.multi_adapter import MultiLoRA
from litmini.methods.adapters import add_adapters, merge_adapters, restore_adapters
from litmini.methods.dora import DoRALinear
from litmini.methods.heads import head_name, use_log_probs, use_scores
from litmini.methods.trainable_tokens import TrainableTokensLayer, add_tokens, vocabulary_modules
from litmini.models import gpt2, gpt_neox, llama, mpt, phi
from litmini.tokenizer import Tokenizer

NEW = ["<|city|>", "Δ river"]
TOKENS = torch.tensor([[3, 512, 7, 513, 9, 512, 100], [513, 40, 41, 512, 5, 6, 7]])


@pytest.fixture(scope="session")
def bases(tmp_path_factory, tokenizer_dir) -> dict[str, Path]:
    """Tiny checkpoints with a head of its own, a tied one, and more rows than tokens."""
    made = {}
    for name, changes in (("untied", {}), ("tied", {"tied": True}), ("padded", {"tied": True, "vocab_size": 520})):
        made[name] = tmp_path_factory.mktemp(name)
        config = llama.Config(**{**vars(llama.PRESETS["tiny"]), **changes})
        model = llama.Model(config)
        model.init_weights(torch.Generator().manual_seed(0))
        state = {n: p for n, p in model.state_dict().items() if not (config.tied and n == "lm_head.weight")}
        save_model(made[name], llama.config_to_hf(config), state.items(), side_files=tokenizer_dir)
    return made


def ours(directory: Path, layer=None, **settings):
    """A model with adapters and two new tokens, and its tokenizer."""
    model, tokenizer = load_model(directory, torch.float32), Tokenizer(directory, new_tokens=NEW)
    add_adapters(model, LoraConfig(rank=4, alpha=12, targets=["q_proj", "up_proj"], **settings), layer)
    add_tokens(model, tokenizer.new_tokens.ids, tokenizer.new_tokens.known)
    return model, tokenizer


def saved(model, tokenizer, directory: Path, base: Path) -> Path:
    directory.mkdir()
    save_adapter(model, directory, str(base))
    tokenizer.save(directory)
    return directory


@pytest.mark.parametrize("name", ["untied", "tied", "padded"])
def test_rows_start_as_the_mean_and_go_to_peft_and_back(bases, tmp_path, name):
    model, tokenizer = ours(bases[name])
    assert tokenizer.new_tokens.ids == [512, 513] and model.config.vocab_size == (520 if name == "padded" else 514)
    plain = load_model(bases[name], torch.float32)
    for part in vocabulary_modules(model):
        layer, rows = model.get_submodule(part), plain.get_submodule(part).weight
        assert_close(layer.rows.weight, rows[:512].mean(0).expand(2, -1))
        assert torch.equal(layer.base.weight[:512], rows[:512]) and torch.equal(layer.base.weight[514:], rows[514:])
    assert_close(model(TOKENS % 512)[..., :512], plain(TOKENS % 512)[..., :512])
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad and "lora" not in n}
    assert sum(trained.values()) == 2 * 64 * (2 if name == "untied" else 1)
    expected = changed(model)(TOKENS)
    adapter = saved(model, tokenizer, tmp_path / "adapter", bases[name])
    said = json.loads((adapter / "adapter_config.json").read_text())["trainable_token_indices"]
    assert said == {key: [512, 513] for key in ["embed_tokens", "lm_head"][: 2 if name == "untied" else 1]}
    again, tokenizer = litmini.load(bases[name], adapter, dtype="fp32")
    assert torch.equal(again(TOKENS), expected) and tokenizer.encode(" ".join(NEW))[:1] == [512]
    assert not any(parameter.requires_grad for parameter in again.parameters())
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32).eval()
    assert_close(theirs(TOKENS).logits[..., :514], expected[..., :514])


@pytest.mark.parametrize("name", ["untied", "tied"])
@pytest.mark.parametrize("both", [False, True])
def test_from_peft_after_it_resized_with_equal_gradients(bases, tmp_path, name, both):
    """PEFT writes all of a resized embedding and head; 512 is trained, 513 is not."""
    base = transformers.AutoModelForCausalLM.from_pretrained(bases[name], dtype=torch.float32)
    base.resize_token_embeddings(514)
    ids = [5, 512]
    config = peft.LoraConfig(
        r=4, lora_alpha=12, task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"],
        trainable_token_indices={"embed_tokens": ids, "lm_head": ids} if both else ids,
    )  # fmt: skip
    reference = changed(peft.get_peft_model(base, config))
    reference.save_pretrained(tmp_path)
    assert any("base_layer" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    model = load_model(bases[name], torch.float32)
    load_adapter(model, tmp_path)
    assert_close(model(TOKENS), reference(TOKENS).logits)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, TrainableTokensLayer)}
    assert len(layers) == (1 if name == "untied" and not both else 2)
    for layer in layers.values():
        layer.rows.requires_grad_(True)
    model(TOKENS).square().mean().backward()
    reference(TOKENS).logits.square().mean().backward()
    gradients = {n: p.grad for n, p in reference.named_parameters() if "trainable_tokens_delta" in n}
    assert len(gradients) == len({id(layer.rows) for layer in layers.values()})
    parts = {n: n.removeprefix("base_model.model.").partition(".token_adapter")[0] for n in gradients}
    assert_gradients_close({n: layers[part].rows.weight.grad for n, part in parts.items()}, gradients)
    merged = export(bases[name], tmp_path / "merged", tmp_path)
    assert_close(load_model(merged, torch.float32)(TOKENS), reference(TOKENS).logits)


@pytest.mark.parametrize("name", ["untied", "tied", "padded"])
def test_merged_and_exported(bases, tmp_path, name):
    """Sizes, ties, tokenizer and stop tokens go along, and transformers loads all of it."""
    model, tokenizer = ours(bases[name], DoRALinear)
    expected = changed(model)(TOKENS)
    replaced = merge_adapters(model)
    assert_close(model(TOKENS), expected)
    restore_adapters(model, replaced)
    assert torch.equal(model(TOKENS), expected)
    merged = export(bases[name], tmp_path / "merged", saved(model, tokenizer, tmp_path / "adapter", bases[name]))
    config = json.loads((merged / "config.json").read_text())
    assert config["vocab_size"] == model.config.vocab_size and config["tie_word_embeddings"] == (name != "untied")
    assert ("lm_head.weight" in load_file(merged / "model.safetensors")) == (name == "untied")
    reference = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    assert_close(reference(TOKENS).logits, expected)
    theirs = transformers.AutoTokenizer.from_pretrained(merged)
    text = "to <|city|>,Δ river and <|im_end|>"
    assert theirs(text)["input_ids"] == Tokenizer(merged, special_tokens_in_text=True).encode(text)
    assert {512, 513} <= set(theirs(text)["input_ids"]) and len(theirs) == 514
    assert Tokenizer(merged).stop_ids == Tokenizer(bases[name]).stop_ids


def test_all_weights_trained_or_a_head_of_log_probabilities(bases, tmp_path):
    model, tokenizer = load_model(bases["tied"], torch.float32), Tokenizer(bases["tied"], new_tokens=NEW)
    add_tokens(model.requires_grad_(True), [512, 513], 512)
    assert all(p.requires_grad for p in model.parameters()) and len(list(model.parameters())) == 20
    expected = changed(model)(TOKENS)
    save_trained(model, tmp_path, bases["tied"])
    tokenizer.save(tmp_path)
    assert torch.equal(load_model(tmp_path, torch.float32)(TOKENS), expected)
    assert_close(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(TOKENS).logits, expected)
    model, _ = ours(bases["untied"])
    plain = changed(model)(TOKENS).log_softmax(-1)
    use_log_probs(model)
    found, _ = model(TOKENS[:, :-1], labels=TOKENS[:, 1:])
    assert_close(found, plain[:, :-1].gather(-1, TOKENS[:, 1:, None])[..., 0])


def test_beside_modules_that_are_trained_in_full(bases, tmp_path):
    """Asked for so: every row of embedding and head."""
    model, tokenizer = ours(bases["untied"], modules_to_save=["embed_tokens", "lm_head"])
    assert not [m for m in model.modules() if isinstance(m, TrainableTokensLayer)]
    expected = changed(model)(TOKENS)
    adapter = saved(model, tokenizer, tmp_path / "adapter", bases["untied"])
    assert torch.equal(litmini.load(bases["untied"], adapter, dtype="fp32")[0](TOKENS), expected)
    assert_close(load_model(export(bases["untied"], tmp_path / "m", adapter), torch.float32)(TOKENS), expected)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32).eval()
    assert_close(theirs(TOKENS).logits, expected)


@pytest.mark.parametrize("module", [gpt2, gpt_neox, mpt, phi])
def test_other_families_by_their_own_names(module, tokenizer_dir, tmp_path):
    """Learned positions, other names, a head with a bias: embedding and head grow, and transformers agrees."""
    config = module.PRESETS["tiny"]
    model = module.Model(config)
    model.init_weights(torch.Generator().manual_seed(0))
    changed(model)
    save_trained_family(module, model, tmp_path / "base", tokenizer_dir)
    extend_vocabulary(tmp_path / "base", tmp_path / "out", NEW)
    add_tokens(model, [512, 513], 512)
    assert torch.equal(load_model(tmp_path / "out", torch.float32)(TOKENS), model(TOKENS))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert_close(theirs(TOKENS).logits, model(TOKENS))
    assert Tokenizer(tmp_path / "out").encode(NEW[0]) == [512]


def save_trained_family(module, model, directory, tokenizer_dir):
    tensors = ((n, p.detach()) for n, p in model.named_parameters())
    tensors = module.to_hf(tensors, model.config) if hasattr(module, "to_hf") else tensors
    directory.mkdir()
    save_model(directory, module.config_to_hf(model.config), list(tensors), side_files=tokenizer_dir)


def test_a_checkpoint_with_more_tokens_has_all_else_bit_by_bit(bases, tmp_path):
    assert extend_vocabulary(bases["untied"], tmp_path / "out", ["<|im_end|>", "Δ"]) == ([2, 512], 512)
    before, after = (load_file(d / "model.safetensors") for d in (bases["untied"], tmp_path / "out"))
    for name, tensor in before.items():
        assert torch.equal(after[name][: len(tensor)], tensor), name
    assert len(after["lm_head.weight"]) == len(after["model.embed_tokens.weight"]) == 513
    with pytest.raises(UserError, match="has all of these tokens"):
        extend_vocabulary(tmp_path / "out", tmp_path / "more", ["Δ"])
    extend_vocabulary(bases["padded"], tmp_path / "padded", NEW)  # which has rows for them
    before, after = (
        load_file(d / "model.safetensors")["model.embed_tokens.weight"] for d in (bases["padded"], tmp_path / "padded")
    )
    assert torch.equal(after[:512], before[:512]) and torch.equal(after[514:], before[514:])
    assert_close(after[512:514], before[:512].mean(0).expand(2, -1))
    tokenizer, model = Tokenizer(tmp_path / "out", new_tokens=["Δ"]), load_model(tmp_path / "out", torch.float32)
    add_adapters(model, LoraConfig(rank=2))
    row = model.lm_head.weight[512].clone()
    add_tokens(model, tokenizer.new_tokens.ids, tokenizer.new_tokens.known)
    assert torch.equal(model.lm_head.rows.weight[0], row), "a token that is there is trained from its row"


def test_which_tokens_are_special(bases, tmp_path):
    """Those of the template: what looks like them in a text is text. A new token is a token wherever it stands."""
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}<|a|>{{ m.content }}<|z|>{% endfor %}")
    tokenizer = Tokenizer(bases["tied"], str(template), new_tokens=["<|a|>", "<|z|>", "<|city|>"])
    assert tokenizer.new_tokens.ids == [512, 513, 514]
    ids = tokenizer.encode_prompt("in <|city|> <|z|>")
    assert ids.count(512) == ids.count(513) == ids.count(514) == 1 and 513 in tokenizer.stop_ids
    tokenizer.save(tmp_path)
    assert Tokenizer(tmp_path).encode_prompt("in <|city|> <|z|>") == ids
    settings = json.loads((bases["tied"] / "tokenizer_config.json").read_text())
    listed = {**settings, "added_tokens_decoder": {"2": {"content": "<|im_end|>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(listed))
    (tmp_path / "tokenizer.json").write_bytes((bases["tied"] / "tokenizer.json").read_bytes())
    (tmp_path / "out").mkdir()
    Tokenizer(tmp_path, str(template), new_tokens=["<|z|>"]).save(tmp_path / "out")
    listed = json.loads((tmp_path / "out/tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert listed["512"]["content"] == "<|z|>" and listed["512"]["special"] and "2" in listed
    content = json.loads((bases["tied"] / "tokenizer.json").read_text())
    content["model"]["vocab"] = {token: i + (i > 500) for token, i in content["model"]["vocab"].items()}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="token <.z.> would get the id 512, which another token has: .* has gaps"):
        Tokenizer(tmp_path, str(template), new_tokens=["<|z|>"])
    for wrong in ([" "], ["a", "a"], [""]):
        with pytest.raises(UserError, match="expected different tokens that are no white space"):
            Tokenizer(bases["tied"], new_tokens=wrong)


def test_what_is_refused(bases, tmp_path):
    model, tokenizer = ours(bases["tied"])
    adapter = saved(changed(model), tokenizer, tmp_path / "adapter", bases["tied"])
    with pytest.raises(UserError, match=r"token 513, but the model has rows for 0 to 511.*merge_adapter"):
        MultiLoRA(load_model(bases["tied"], torch.float32)).add("x", adapter)
    with pytest.raises(UserError, match="tied: with new tokens, name both"):
        ours(bases["tied"], modules_to_save=["lm_head"])
    model = load_model(bases["untied"], torch.float32)
    add_adapters(model, LoraConfig(rank=2, targets=["lm_head"]))
    with pytest.raises(UserError, match="lm_head has an adapter, which does not go with new tokens"):
        add_tokens(model, [512], 512)
    with pytest.raises(UserError, match="does not belong to this model"):
        add_tokens(load_model(bases["untied"]), [600], 600)
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    for indices, message in (
        ({"embed_tokens": [512, 10**30]}, r"trains the token 10+, the model has rows for 0 to 511.*none between"),
        ({"embed_tokens": [512]}, r"adapter has \(2, 64\) rows of tokens, its settings and the model want \(1, 64\)"),
        ({"embed_tokens": [512, -1]}, "expected different token ids"),
        ("all", "expected different token ids"),
        (None, "unexpected tensors: .*trainable_tokens_delta"),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "trainable_token_indices": indices}))
        with pytest.raises(UserError, match=message):
            load_adapter(load_model(bases["tied"], torch.float32), adapter)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    key = next(key for key in tensors if key.endswith("delta"))
    save_file({k: t for k, t in tensors.items() if k != key}, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match="names it, and the adapter has no rows for it"):
        load_adapter(load_model(bases["tied"], torch.float32), adapter)


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_in_bf16_rows_are_rounded_where_they_are_used(bases, name):
    """The model computes and merges in the dtype of its base; what is trained is fp32."""
    model, tokenizer = load_model(bases[name], torch.bfloat16), Tokenizer(bases[name], new_tokens=NEW)
    add_adapters(model, LoraConfig(rank=4))
    add_tokens(model, tokenizer.new_tokens.ids, tokenizer.new_tokens.known)
    changed(model)
    embedding = model.model.embed_tokens
    assert embedding.rows.weight.dtype == torch.float32
    assert torch.equal(embedding(TOKENS)[TOKENS >= 512], embedding.rows.weight.bfloat16()[TOKENS[TOKENS >= 512] - 512])
    assert embedding(TOKENS).dtype == model(TOKENS).dtype == torch.bfloat16
    merge_adapters(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.lm_head.weight[:512], load_model(bases[name], torch.bfloat16).lm_head.weight[:512])


def test_a_head_with_a_bias_is_refused_beside_adapters(tokenizer_dir, tmp_path):
    model = phi.Model(phi.PRESETS["tiny"])
    add_adapters(model, LoraConfig(rank=2, targets=["q_proj"]))
    with pytest.raises(UserError, match="lm_head has a bias, which PEFT leaves out .*lora.modules_to_save"):
        add_tokens(model, [512, 513], 512)


def peft_adapter(base: Path, directory: Path, **settings) -> Path:
    """An adapter that PEFT has trained and saved."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    changed(
        peft.get_peft_model(theirs, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **settings))
    ).save_pretrained(directory)  # fmt: skip
    return directory


def test_a_tied_head_with_rows_of_its_own_is_refused(bases, tmp_path):
    """In PEFT its rows then differ from those of the embedding."""
    alone = peft_adapter(
        bases["tied"], tmp_path / "a", target_modules=["q_proj"], trainable_token_indices={"lm_head": [5, 6]}
    )
    for use in (lambda: load_adapter(load_model(bases["tied"], torch.float32), alone),
                lambda: export(bases["tied"], tmp_path / "m", alone)):  # fmt: skip
        with pytest.raises(
            UserError, match="lm_head: the adapter trains rows of it alone, and it is tied to model.embed"
        ):
            use()
    both = {"embed_tokens": [5, 6], "lm_head": [5, 7]}
    model, tokenizer = ours(bases["tied"])
    adapter = saved(model, tokenizer, tmp_path / "adapter", bases["tied"])
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("delta"))
    save_file({**tensors, key.replace("model.embed_tokens", "lm_head"): tensors[key].clone()}, file)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "trainable_token_indices": both}))
    with pytest.raises(UserError, match="names other tokens for lm_head than for model.embed_tokens"):
        load_adapter(load_model(bases["tied"], torch.float32), adapter)


def test_adapters_that_do_not_fit(bases, tmp_path):
    """Rows beside an adapter over the same head, another embedding by its shape, and one token too many."""
    twice = peft_adapter(
        bases["untied"], tmp_path / "twice", target_modules=["q_proj", "lm_head"], trainable_token_indices=[5]
    )
    config = json.loads((twice / "adapter_config.json").read_text())
    tensors = load_file(twice / "adapter_model.safetensors")
    delta = next(key for key in tensors if key.endswith("trainable_tokens_delta"))
    tensors[delta.replace("model.embed_tokens", "lm_head")] = tensors.pop(delta)
    save_file(tensors, twice / "adapter_model.safetensors")
    (twice / "adapter_config.json").write_text(json.dumps({**config, "trainable_token_indices": {"lm_head": [5]}}))
    with pytest.raises(UserError, match="lm_head: the adapter trains rows of it, and it has an adapter"):
        load_adapter(load_model(bases["untied"], torch.float32), twice)
    other = peft_adapter(bases["untied"], tmp_path / "other", target_modules=["q_proj"], trainable_token_indices=[5])
    tensors = load_file(other / "adapter_model.safetensors")
    tensors["base_model.model.model.embed_tokens.token_adapter.base_layer.weight"] = torch.zeros(512, 32)
    save_file(tensors, other / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"another base: it brings model.embed_tokens \(512, 32\)"):
        load_adapter(load_model(bases["untied"], torch.float32), other)
    model, tokenizer = load_model(bases["untied"], torch.float32), Tokenizer(bases["untied"], new_tokens=NEW[:1])
    add_adapters(model, LoraConfig(rank=2))
    add_tokens(model, tokenizer.new_tokens.ids, tokenizer.new_tokens.known)
    one = saved(model, tokenizer, tmp_path / "one", bases["untied"])
    with pytest.raises(UserError, match="token 512, but the model has rows for 0 to 511"):
        MultiLoRA(load_model(bases["untied"], torch.float32)).add("x", one)


def test_several_adapters_over_a_base_that_has_the_rows(bases, tmp_path):
    """Rows that exist (of an extended or a padded base) are each adapter's own."""
    model, tokenizer = ours(bases["padded"])
    expected = changed(model)(TOKENS)
    adapter = saved(model, tokenizer, tmp_path / "adapter", bases["padded"])
    base = load_model(bases["padded"], torch.float32)
    plain = base(TOKENS)
    served = MultiLoRA(base)
    served.add("x", adapter)
    with served.use(["x", None]):
        found = base(TOKENS)
    assert_close(found[0], expected[0])
    assert_close(found[1], plain[1])


def test_an_adapter_that_brings_another_embedding_has_a_base_of_its_own(bases, tmp_path):
    """PEFT's `save_embedding_layers`."""
    base = transformers.AutoModelForCausalLM.from_pretrained(bases["untied"], dtype=torch.float32)
    base.get_input_embeddings().weight.data += 1
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5], task_type="CAUSAL_LM")
    reference = changed(peft.get_peft_model(base, config))
    reference.save_pretrained(tmp_path, save_embedding_layers=True)
    model = load_model(bases["untied"], torch.float32)
    with pytest.raises(UserError, match="embed_tokens: the adapter brings another one"):
        MultiLoRA(model).add("x", tmp_path)
    load_adapter(model, tmp_path)
    assert_close(model(TOKENS % 512), reference(TOKENS % 512).logits)


def test_scores_beside_new_tokens(bases, tmp_path):
    """A classifier's head has no logits of tokens: only the embedding grows."""
    model = load_model(bases["untied"], torch.float32)
    use_scores(model, 3)
    add_adapters(model, LoraConfig(rank=2, modules_to_save=["score"]))
    add_tokens(model, [512, 513], 512)
    assert vocabulary_modules(model) == ["model.embed_tokens"]
    changed(model)
    labels = torch.full_like(TOKENS, -100)
    labels[:, -1] = 0
    scores, _ = model(TOKENS, labels=labels)
    save_adapter(model, tmp_path, str(bases["untied"]))
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        bases["untied"], num_labels=3, pad_token_id=0, dtype=torch.float32
    )
    theirs.resize_token_embeddings(514)
    assert_close(peft.PeftModel.from_pretrained(theirs, tmp_path).eval()(TOKENS).logits, scores)


def test_the_command_that_extends_a_vocabulary(bases, tmp_path, monkeypatch, capsys):
    script = Path(__file__).parents[2] / "scripts/extend_vocabulary.py"
    words = ["--checkpoint_dir", str(bases["tied"]), "--new_tokens", '["<|city|>"]', "--out_dir", str(tmp_path / "out")]
    for status, said in ((0, "<|city|>  512"), (1, "exists already; choose another --out_dir")):
        monkeypatch.setattr("sys.argv", [str(script), *words])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(script), run_name="__main__")
        assert end.value.code == status and said in "".join(capsys.readouterr())
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert reference.lm_head.weight is reference.get_input_embeddings().weight and len(reference.lm_head.weight) == 513


def test_a_script_that_does_not_know_new_tokens(bases, tmp_path):
    """What an embedding has no row for is an error, not an index."""
    from litmini.tasks.setup import make_setup

    model, tokenizer = load_model(bases["untied"]), Tokenizer(bases["untied"], new_tokens=NEW)
    data, directory = SimpleNamespace(tokenizer=tokenizer), SimpleNamespace(config=None)
    with pytest.raises(UserError, match="data.new_tokens is not implemented here"):
        make_setup(directory, None, data, model, None)


def test_over_four_bits_and_a_head_by_another_name(bases, tmp_path):
    from litmini.checkpoints.load import load_quantized

    model = load_quantized(bases["tied"], QuantizeConfig(4), torch.float32)
    add_adapters(model, LoraConfig(rank=2))
    add_tokens(model, [512, 513], 512)
    assert head_name(model) == "lm_head"
    expected = changed(model)(TOKENS)
    tokenizer = Tokenizer(bases["tied"], new_tokens=NEW)
    (tmp_path / "a").mkdir()
    save_adapter(model, tmp_path / "a", str(bases["tied"]), quantize=QuantizeConfig(4))
    tokenizer.save(tmp_path / "a")
    assert torch.equal(litmini.load(bases["tied"], tmp_path / "a", dtype="fp32", bits=4)[0](TOKENS), expected)
    merged = export(bases["tied"], tmp_path / "m", tmp_path / "a")
    assert_close(load_model(merged, torch.float32)(TOKENS), expected)
    assert read_adapter(shutil.copytree(tmp_path / "a", tmp_path / "b")).tokens
