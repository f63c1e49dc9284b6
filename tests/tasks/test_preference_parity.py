"""Preference losses, their gradients and metrics against the trainers of TRL, on tiny models in fp32."""

import collections
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import trl
from datasets import Dataset
from numerics import assert_gradients_close
from preference_parts import (
    examples_of,
    policy,
    save_policy,
    sequences,
    step,
    with_reference,
    write_labelled,
    write_pairs,
)
from tiny import make_family
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from litmini.config.preference import PreferenceConfig
from litmini.ops.cross_entropy import IGNORE

CLOSE = 1e-5  # relative to the size of what is compared
ULPS = CLOSE / torch.finfo(torch.float32).eps
LENGTH = 37  # of which some completions are truncated, to one token or more


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer_dir) -> Path:
    place = tmp_path_factory.mktemp("parity")
    write_pairs(place / "pairs.jsonl")
    write_labelled(place / "labelled.jsonl")
    return place


@pytest.fixture(scope="module")
def both(place, tokenizer_dir):
    """For a family: its base, our policy, and the same for transformers."""
    made: dict[str, Any] = {}

    def get(family: str) -> tuple[Path, Any, Path]:
        if family not in made:
            base = make_family(family, place / family, tokenizer_dir)
            model = policy(base)
            made[family] = base, model, save_policy(model, base, place / f"{family}-policy")
        return made[family]

    return get


def hf(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )


def documents(data: Any) -> list[tuple[list[int], list[int]]]:
    """(prompt, completion) of every document of some examples, in token ids."""
    found = []
    for i in range(len(data)):
        inputs, labels = data[i]
        at = 0
        for size in data.documents(i):
            own, targets = inputs[at : at + size].tolist(), labels[at : at + size]
            first = int(np.flatnonzero(targets != IGNORE)[0])
            found.append((own[: first + 1], [*own[first + 1 :], int(targets[-1])]))
            at += size
    return found


class Trainer:
    """What TRL's methods ask of `self`: one process, no mixed precision, metrics in lists."""

    def __init__(self, model: Any, **settings: Any) -> None:
        same = {name: (lambda x, **_: x) for name in ("gather", "gather_for_metrics", "unwrap_model")}
        self.accelerator = SimpleNamespace(device=torch.device("cpu"), **same)
        self._metrics = collections.defaultdict(lambda: collections.defaultdict(list))
        self._total_train_tokens, self._tp_size, self.model = 0, 1, model
        self.aux_loss_enabled = self.precompute_ref_logps = False
        vars(self).update(settings)

    def __getattr__(self, name: str) -> Any:
        method = getattr(type(self).theirs, name)
        return method if isinstance(vars(type(self).theirs).get(name), staticmethod) else method.__get__(self)


def dpo(place: Path, theirs: Any, base: Path, config: PreferenceConfig) -> Any:
    """TRL's trainer as a user makes it, with the base as its reference."""
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    args = trl.DPOConfig(
        output_dir=str(place / "dpo"), loss_type=[config.loss], beta=config.beta, label_smoothing=config.label_smoothing,
        report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=LENGTH + 1,
    )  # fmt: skip
    if config.sft_weight:
        args.loss_type, args.loss_weights = [config.loss, "sft"], [1.0, config.sft_weight]
    return trl.DPOTrainer(
        theirs, ref_model=hf(base), args=args, train_dataset=Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(base),
    )  # fmt: skip


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check(ours: Any, loss: Any, theirs: Any, metrics: dict[str, Any], names: dict[str, str]) -> None:
    mean, gradients, found = ours
    assert mean == pytest.approx(float(loss), rel=CLOSE)
    assert_gradients_close(gradients, gradients_of(theirs), ULPS)
    for name, their_name in names.items():
        (expected,) = metrics[their_name] if isinstance(metrics[their_name], list) else [metrics[their_name]]
        assert found[name] == pytest.approx(float(expected), rel=CLOSE, abs=CLOSE), name


DPO_NAMES = {
    "reward_chosen": "rewards/chosen", "reward_rejected": "rewards/rejected", "margin": "rewards/margins",
    "accuracy": "rewards/accuracies", "logp_chosen": "logps/chosen", "logp_rejected": "logps/rejected",
}  # fmt: skip


@pytest.mark.parametrize(
    ("loss", "more", "family"),
    [
        ("sigmoid", {}, "llama"),
        ("sigmoid", {}, "qwen2"),
        ("sigmoid", {}, "gemma2"),
        ("robust", {"label_smoothing": 0.2}, "llama"),
        ("hinge", {"beta": 0.5}, "llama"),
        ("ipo", {"beta": 0.3}, "llama"),
        ("apo_zero", {}, "llama"),
        ("apo_down", {}, "llama"),
    ],
)
def test_losses_with_a_reference_are_those_of_dpo_trainer(place, both, loss, more, family):
    base, model, saved = both(family)
    config, theirs = PreferenceConfig(loss, **more), hf(saved)
    examples = examples_of(place / "pairs.jsonl", base, length=LENGTH)
    assert examples.statistics["truncated_examples"] > 3 and {1, 2, 9} <= {len(c) for _, c in documents(examples)}
    trainer = dpo(place, theirs, base, config)
    docs = documents(examples)
    rows = [
        {"prompt_ids": c[0], "chosen_ids": c[1], "rejected_ids": r[1]}
        for c, r in zip(docs[::2], docs[1::2], strict=True)
    ]
    batch = DataCollatorForPreference(0, max_length=LENGTH + 1)(rows)
    trainer.model.train()
    total = trainer.compute_loss(trainer.model, batch)
    total.backward()
    data = with_reference(sequences(examples, LENGTH, pack=True), base)
    ours = step(config, model, list(data.batches(range(len(data)), 3)))
    check(ours, total.detach(), theirs, trainer._metrics["train"], DPO_NAMES)


def test_the_nll_of_a_pair_is_that_of_dpo_trainer_with_one_pair_in_a_micro_batch(place, both):
    """TRL has a mean over the tokens of a micro-batch, here it is one over the tokens of each pair."""
    base, model, saved = both("llama")
    config, theirs = PreferenceConfig(sft_weight=0.7), hf(saved)
    examples = examples_of(place / "pairs.jsonl", base, length=LENGTH)
    trainer, docs = dpo(place, theirs, base, config), documents(examples)
    total = torch.zeros(())
    for (prompt, chosen), (_, rejected) in zip(docs[::2], docs[1::2], strict=True):
        one = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        loss = trainer.compute_loss(trainer.model, DataCollatorForPreference(0)([one])) / (len(docs) / 2)
        loss.backward()
        total += loss.detach()
    data = with_reference(sequences(examples, LENGTH), base)
    check(step(config, model, list(data.batches(range(len(data)), 4))), total, theirs, {}, {})


AVERAGED = {name: their for name, their in DPO_NAMES.items() if not name.startswith("logp")}  # TRL's are per token


class Cpo(Trainer):
    theirs = CPOTrainer


class Orpo(Trainer):
    theirs = ORPOTrainer


def padded_pairs(docs: list[tuple[list[int], list[int]]], numbers: Any) -> dict[str, torch.Tensor]:
    """A batch as the trainers without a reference take it."""
    found = {}
    for name, own in (("chosen", docs[::2]), ("rejected", docs[1::2])):
        rows = [own[i] for i in numbers]
        longest = max(len(p) + len(c) for p, c in rows)
        for key, value in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
            kinds = {"input_ids": lambda p, c: p + c, "attention_mask": lambda p, c: [1] * len(p + c)}
            kinds["labels"] = lambda p, c: [-100] * len(p) + c
            rows_ = [[*kinds[key](p, c), *[value] * (longest - len(p) - len(c))] for p, c in rows]
            found[f"{name}_{key}"] = torch.tensor(rows_)
    return found


@pytest.mark.parametrize(
    ("loss", "more", "their_type"),
    [
        ("cpo", {"label_smoothing": 0.1}, "sigmoid"),
        ("cpo", {"alpha": 0.0}, "sigmoid"),
        ("simpo", {"beta": 2.0, "gamma": 0.7}, "simpo"),
        ("simpo", {"beta": 2.0, "label_smoothing": 0.1}, "simpo"),
    ],
)
def test_losses_without_a_reference_are_those_of_cpo_trainer(place, both, loss, more, their_type):
    base, model, saved = both("qwen2")
    config, theirs = PreferenceConfig(loss, **more), hf(saved)
    trainer = Cpo(
        theirs, is_encoder_decoder=False, pad_token_id=0, loss_type=their_type, beta=config.beta, alpha=0.0,
        simpo_gamma=config.gamma, label_smoothing=config.label_smoothing, cpo_alpha=config.alpha if loss == "cpo" else 0.0,
    )  # fmt: skip
    examples = examples_of(place / "pairs.jsonl", base, length=LENGTH)
    docs, total, seen = documents(examples), torch.zeros(()), collections.Counter()
    for i in range(len(examples)):  # one pair in a micro-batch: the mean over its tokens is that of the pair
        own, metrics = trainer.get_batch_loss_metrics(theirs, padded_pairs(docs, [i]))
        (own / len(examples)).backward()
        total += own.detach() / len(examples)
        seen.update({name: value / len(examples) for name, value in metrics.items()})
    data = sequences(examples, LENGTH, pack=True)
    names = DPO_NAMES if loss == "cpo" else AVERAGED
    check(step(config, model, list(data.batches(range(len(data)), 2))), total, theirs, seen, names)


def test_orpo_is_that_of_orpo_trainer_but_for_the_tokens_of_its_nll(place, both):
    """Theirs is over prompt and completion, ours over the completion, as in the paper."""
    base, model, saved = both("llama")
    config, theirs = PreferenceConfig("orpo", beta=0.3), hf(saved)
    trainer = Orpo(theirs, is_encoder_decoder=False, padding_value=0, beta=config.beta)
    examples = examples_of(place / "pairs.jsonl", base, length=LENGTH)
    docs, total, seen = documents(examples), torch.zeros(()), collections.Counter()
    for i in range(len(examples)):
        batch = padded_pairs(docs, [i])
        own, metrics = trainer.get_batch_loss_metrics(theirs, batch)
        assert own != theirs(batch["chosen_input_ids"], labels=batch["chosen_labels"]).loss
        labels = batch["chosen_input_ids"]
        own = own - theirs(labels, labels=labels).loss + theirs(labels, labels=batch["chosen_labels"]).loss
        (own / len(examples)).backward()
        total += own.detach() / len(examples)
        seen.update({name: value / len(examples) for name, value in metrics.items()})
    data = sequences(examples, LENGTH)
    check(step(config, model, list(data.batches(range(len(data)), 5))), total, theirs, seen, AVERAGED)


KTO_NAMES = {name: their for name, their in DPO_NAMES.items() if name != "accuracy"} | {"z": "kl"}


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.5, 0.5)])
@pytest.mark.parametrize("seed", [1, 2], ids=["z is above 0", "z is 0"])
def test_kto_is_that_of_kto_trainer_with_the_whole_step_in_a_micro_batch(place, both, tmp_path, weights, seed):
    base, model, saved = both("llama")
    config = PreferenceConfig("kto", desirable_weight=weights[0], undesirable_weight=weights[1], beta=0.5)
    start, theirs = (base, hf(saved)) if seed == 2 else (saved, hf(base))  # the policy moved away, or towards
    examples = examples_of(place / "labelled.jsonl", base, "single", LENGTH)
    args = trl.KTOConfig(
        output_dir=str(tmp_path / "kto"), beta=config.beta, desirable_weight=weights[0], undesirable_weight=weights[1],
        report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, train_sampling_strategy="sequential",
        per_device_train_batch_size=2,
    )  # fmt: skip
    rows = [{"prompt": "a", "completion": "b", "label": True}, {"prompt": "c", "completion": "d", "label": False}]
    trainer = trl.KTOTrainer(
        theirs, ref_model=hf(start), args=args, train_dataset=Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(base),
    )  # fmt: skip
    twins = documents(examples.mismatched())
    rows = [
        {"prompt_ids": p, "completion_ids": c, "KL_completion_ids": k[1], "label": bool(e["desirable"])}
        for (p, c), k, e in zip(documents(examples), twins, examples.table, strict=True)
    ]
    assert all(row["prompt_ids"] == twin[0] for row, twin in zip(rows, twins, strict=True))
    batch = DataCollatorForUnpairedPreference(0)(rows)
    trainer.model.train()
    total = trainer.compute_loss(trainer.model, batch)
    total.backward()
    data = with_reference(sequences(examples, LENGTH, pack=True), start)
    batches = [*data.mismatched.batches(range(len(data)), 3), *data.batches(range(len(data)), 2)]
    ours = step(config, model if start == base else policy(base, size=0.0), batches)
    check(ours, total.detach(), theirs, trainer._metrics["train"], KTO_NAMES)
    assert (ours[2]["z"] > 0) == (seed == 1)
