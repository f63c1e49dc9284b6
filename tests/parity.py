"""What every family must show, as a class that a family's test file inherits from:

class TestGemma(FamilyTests):
    module = gemma
    cases = {"mqa": GemmaConfig(**SMALL, num_key_value_heads=1), ...}
    refused = {"hidden_act": GemmaConfig(**SMALL, hidden_act="silu").to_dict(), ...}
    counts = {"google/gemma-2b": 2_506_172_416, ...}
"""

import copy
import json
import math
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from numerics import (
    ULPS,
    Float64,
    assert_as_accurate,
    assert_close,
    assert_gradients_as_accurate,
    assert_gradients_close,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedConfig

from litmini.checkpoints.config import disk_tensors
from litmini.checkpoints.hf import load_model, save_model
from litmini.models import family
from litmini.ops.kv_cache import KVCache
from litmini.training.low_memory import checkpoint_activations

VOCAB, T = 97, 61
SMALL = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def reference(config: PreTrainedConfig) -> Any:
    """transformers' model in fp32, eager, with every parameter away from its default."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif parameter.dim() < 2:
                parameter.normal_(std=0.5, generator=generator)
            else:
                sharp = 2.0 if "q_proj" in name or "k_proj" in name else 1.0  # so that attention is far from even
                parameter.normal_(std=sharp / math.sqrt(parameter.shape[-1]), generator=generator)
    return model


def batch(rows: int = 2, length: int = T) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and labels shifted by one with some of them left out."""
    tokens = torch.randint(0, VOCAB, (rows, length))
    labels = torch.cat((tokens[:, 1:], torch.full((rows, 1), -100)), 1)
    return tokens, labels.masked_fill(torch.rand(labels.shape) < 0.2, -100)


class FamilyTests:
    """Parametrised over `cases`; a case's config must be small, and T = 61 tokens several of its windows long."""

    module: ClassVar[ModuleType]
    cases: ClassVar[dict[str, PreTrainedConfig]]
    refused: ClassVar[dict[str, dict[str, Any]]]
    """key that the error must name -> config.json that must be refused."""
    counts: ClassVar[dict[str, int]]
    """preset -> published number of parameters, tied ones counted once; every preset but `tiny`."""
    fixed: ClassVar[tuple[str, ...]] = ()
    """Cases in which transformers itself is wrong and fixed by a fixture; left out of the measured table."""

    @pytest.fixture
    def directory(self, tmp_path, tokenizer_dir):
        """Write a reference model as transformers does."""

        def write(theirs) -> Path:
            target = tmp_path / "theirs"
            shutil.rmtree(target, ignore_errors=True)
            theirs.save_pretrained(target)
            for file in tokenizer_dir.iterdir():
                shutil.copy(file, target)
            return target

        return write

    def their_gradients(self, theirs) -> dict[str, torch.Tensor]:
        """By the names that transformers gives on disk; to be overridden where those in memory differ."""
        return {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}

    def our_gradients(self, model) -> dict[str, torch.Tensor]:
        found = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
        return dict(disk_tensors(self.module, model.config, found))

    def their_loss(self, output, labels) -> torch.Tensor:
        """The mean loss of a batch; to be overridden where the family adds to it."""
        return F.cross_entropy(output.logits.flatten(0, 1), labels.flatten())

    def test_logits_loss_and_gradients(self, case, directory):
        """As accurate as those of transformers, measured against transformers in fp64."""
        theirs = reference(self.cases[case])
        model, theirs_in_fp64 = load_model(directory(theirs), torch.float32), copy.deepcopy(theirs).double()
        theirs_in_fp64.set_experts_implementation("eager")  # grouped matmuls know no fp64
        tokens, labels = batch()
        output = theirs(tokens, use_cache=False)
        with Float64():
            exact = theirs_in_fp64(tokens, use_cache=False)
        assert_as_accurate(model(tokens), output.logits, exact.logits)
        loss, exact_loss = self.their_loss(output, labels), self.their_loss(exact, labels)
        loss.backward()
        exact_loss.backward()
        loss_sum, n_targets = model(tokens, labels=labels)
        assert n_targets == (labels != -100).sum()
        assert_close(loss_sum / n_targets, loss)
        (loss_sum / n_targets).backward()
        reference_gradients, exact_gradients = map(self.their_gradients, (theirs, theirs_in_fp64))
        assert_gradients_as_accurate(self.our_gradients(model), reference_gradients, exact_gradients)

    def test_bf16_is_as_near_to_fp32_as_that_of_transformers(self, case, directory):
        theirs = reference(self.cases[case])
        path, (tokens, _) = directory(theirs), batch(4)
        with torch.no_grad():
            exact = theirs(tokens, use_cache=False).logits
            rounded = theirs.bfloat16()(tokens, use_cache=False).logits.float()
            ours = load_model(path, torch.bfloat16)(tokens).float()
        assert (ours - exact).square().mean().sqrt() <= 1.5 * (rounded - exact).square().mean().sqrt()

    def test_padded_batch(self, case, directory):
        theirs = reference(self.cases[case])
        model, (tokens, _) = load_model(directory(theirs), torch.float32), batch(3)
        lengths = [T, 40, 7]
        positions = torch.arange(T).expand(3, T)
        documents = (positions < torch.tensor(lengths)[:, None]).long()
        padded = model(tokens, positions=positions, documents=documents)
        for row, length in enumerate(lengths):
            alone = theirs(tokens[row : row + 1, :length], use_cache=False).logits
            assert_close(padded[row : row + 1, :length], alone)

    def test_cached_equals_uncached(self, case, directory):
        model, (tokens, _) = load_model(directory(reference(self.cases[case])), torch.float32), batch()
        with torch.no_grad():
            expected = model(tokens)
            cache = KVCache(model.config, len(tokens), T, torch.float32, chunk=20)
            parts = [model(part, cache=cache) for part in tokens.split([20, 5, *[1] * (T - 25)], dim=1)]
        assert_close(torch.cat(parts, 1), expected)

    def test_packed_equals_separate(self, case, directory):
        """Loss and gradients."""
        model, lengths = load_model(directory(reference(self.cases[case])), torch.float32), [30, 1, 19, 11]
        tokens, labels = batch(1)
        ends = torch.tensor(lengths).cumsum(0) - 1
        labels[0, ends] = -100
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        documents = torch.cat([torch.full((n,), i + 1) for i, n in enumerate(lengths)])[None]
        loss, targets = model(tokens, positions=positions, documents=documents, labels=labels)
        loss.backward()
        packed = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        self.check_separate(model, tokens, labels, lengths, loss, targets, packed)

    def check_separate(self, model, tokens, labels, lengths, loss, targets, packed) -> None:
        losses, counts = [], []
        for part, want in zip(tokens.split(lengths, 1), labels.split(lengths, 1), strict=True):
            alone, count = model(part, labels=want)
            alone.backward()
            losses.append(alone.detach())
            counts.append(count)
        assert targets == sum(counts)
        assert_close(loss.detach(), torch.stack(losses).sum())
        assert_gradients_close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, packed)

    def test_import_and_export_are_bit_identical(self, case, directory, tmp_path, tokenizer_dir):
        theirs = reference(self.cases[case])
        source = directory(theirs)
        expected = load_file(source / "model.safetensors")
        model = load_model(source, torch.float32)
        for shard_bytes in (20_000, 10**9):
            target = tmp_path / str(shard_bytes)
            target.mkdir()
            tensors = disk_tensors(self.module, model.config, [(n, p.detach()) for n, p in model.named_parameters()])
            save_model(target, self.module.config_to_hf(model.config), tensors, tokenizer_dir, shard_bytes)
            files = list(target.glob("*.safetensors"))
            assert (len(files) > 1) == (shard_bytes == 20_000)
            written = {name: t for file in files for name, t in load_file(file).items()}
            assert written.keys() == expected.keys()
            assert all(torch.equal(written[name], expected[name]) for name in expected)
            again, report = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True, dtype=torch.float32)
            assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
            tokens, _ = batch()
            with torch.no_grad():
                exported = again.eval()(tokens, use_cache=False).logits
            assert_close(exported, theirs(tokens, use_cache=False).logits)

    def test_config_goes_in_and_out(self, case):
        config = self.module.config_from_hf(json.loads(self.cases[case].to_json_string()))
        assert self.module.config_from_hf(json.loads(json.dumps(self.module.config_to_hf(config)))) == config

    def test_presets_go_in_and_out_and_have_the_published_size(self):
        assert self.counts.keys() == self.module.PRESETS.keys() - {"tiny"}
        for name, config in self.module.PRESETS.items():
            written = self.module.config_to_hf(config)
            assert family(written["model_type"]) is self.module
            assert self.module.config_from_hf(json.loads(json.dumps(written))) == config, name
            with torch.device("meta"):
                size = sum(p.numel() for p in self.module.Model(config).parameters())
            assert size == self.counts.get(name, size), f"{name}: {size}"

    def test_what_is_not_implemented_is_refused(self):
        assert self.refused
        for key, config in self.refused.items():
            with pytest.raises(
                ValueError, match=rf"not implemented in {self.module.__name__.split('.')[-1]}.py.*{key}"
            ):
                self.module.config_from_hf(config)

    def test_init_weights_touches_everything(self):
        model = self.module.Model(self.module.PRESETS["tiny"])
        for parameter in model.parameters():
            parameter.data.fill_(math.nan)
        model.init_weights(torch.Generator().manual_seed(0))
        assert all(p.isfinite().all() for p in model.parameters())
        tokens = torch.randint(0, model.config.vocab_size, (2, 32))
        with torch.no_grad():  # the next token: with a tied head the same token is likely
            loss, count = model(tokens, labels=tokens.roll(-1, 1))
        assert abs(float(loss / count) - math.log(model.config.vocab_size)) < 1

    def test_positions_far_away_in_bf16(self, case, directory):
        """Requirement 11: rotary is computed in fp32, so that distances count, not positions."""
        model, (tokens, _) = load_model(directory(reference(self.cases[case])), torch.bfloat16), batch(1, 6)
        if getattr(self, "absolute_positions", False):
            pytest.skip("learned positions")
        with torch.no_grad():
            near = model(tokens, positions=torch.arange(6)[None]).float()
            far = model(tokens, positions=torch.arange(6)[None] + 9_000).float()
        assert (near - far).abs().max() < 0.1 * near.abs().max()


class ExpertFamilyTests(FamilyTests):
    """What families with experts must show as well; their `Router` has `n_active`."""

    amplified: ClassVar[float] = 1.0
    """By how much recurrent layers amplify the rounding of gradients."""

    def test_positions_far_away_in_bf16(self, case, directory):
        """With every expert active: else a rounding may send a token elsewhere, and the two are far apart."""

        def use_all(module, _):
            if isinstance(module, self.module.Router):
                module.n_active = len(module.weight)

        with torch.nn.modules.module.register_module_forward_pre_hook(use_all):
            super().test_positions_far_away_in_bf16(case, directory)

    @pytest.mark.parametrize("padded", [False, True])
    def test_training_loss_and_gradients_with_the_balance_loss(self, case, padded, directory):
        config = type(self.cases[case])(**{**self.cases[case].to_dict(), "router_aux_loss_coef": 0.7})
        theirs = reference(config)
        model, (tokens, labels) = load_model(directory(theirs), torch.float32).train(), batch(3)
        real = torch.arange(T).expand(3, T) < torch.tensor([T, 40, 7] if padded else [T] * 3)[:, None]
        labels = labels.masked_fill(~real, -100)
        mask = real.long() if padded else None
        output = theirs.train()(tokens, attention_mask=mask, output_router_logits=True, use_cache=False)
        cross_entropy = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
        loss = cross_entropy + 0.7 * output.aux_loss
        loss.backward()
        loss_sum, n_targets = model(tokens, documents=mask, labels=labels)
        assert_close(loss_sum / n_targets, loss)
        (loss_sum / n_targets).backward()
        assert_gradients_close(self.our_gradients(model), self.their_gradients(theirs), self.amplified * ULPS)
        with torch.no_grad():  # evaluation is cross entropy alone
            alone, _ = model.eval()(tokens, documents=mask, labels=labels)
        assert_close(alone / n_targets, cross_entropy.detach())
        assert (loss - cross_entropy).detach() > 0.5  # the balance loss is near to n_active, at least

    def test_activation_checkpointing_gives_the_same_gradients(self, case, directory):
        model, (tokens, labels) = load_model(directory(reference(self.cases[case])), torch.float32).train(), batch()
        gradients = []
        for _ in range(2):
            model.zero_grad()
            model(tokens, labels=labels)[0].backward()
            gradients.append([p.grad for p in model.parameters()])
            checkpoint_activations(model)
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
