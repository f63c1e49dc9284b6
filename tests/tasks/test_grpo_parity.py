"""The loss of policy optimization, its gradients and metrics against the trainers of TRL, on a tiny model in fp32."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from grpo_parts import GROUPS, N, batch_of, completions, log_probs_of, model_of, step, trainer
from numerics import assert_gradients_close
from preference_parts import save_policy
from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer
from trl.trainer.utils import nanstd, selective_log_softmax

from litmini.config.grpo import GrpoConfig
from litmini.tasks import grpo_losses

CLOSE = 1e-5  # relative to the size of what is compared
ULPS = CLOSE / torch.finfo(torch.float32).eps
LONGEST = 16


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_dir) -> Path:
    return save_policy(model_of(tiny_dir), tiny_dir, tmp_path_factory.mktemp("grpo") / "policy")


def rewards_of(rows: list[dict[str, Any]]) -> Tensor:
    return torch.tensor([row["reward"] for row in rows], dtype=torch.float64).view(GROUPS, N)


def padded(rows: list[list[int]], left: bool) -> tuple[Tensor, Tensor]:
    """Token ids and mask, padded on one side."""
    T = max(map(len, rows))
    ids = torch.tensor([[0] * (T - len(r)) * left + r + [0] * (T - len(r)) * (not left) for r in rows])
    lengths = torch.tensor([[len(r)] for r in rows])
    where = torch.arange(T)[None]
    return ids, ((where >= T - lengths) if left else (where < lengths)).long()


def their_log_probs(model: Any, temperature: float) -> Any:
    """`_get_per_token_logps_and_entropies` of both trainers, whose model has no head of TRL's."""

    def get(_: Any, ids: Tensor, mask: Tensor, keep: int, **__: Any) -> tuple[Tensor, Tensor, None]:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -keep - 1 : -1]
        found = selective_log_softmax(logits / temperature, ids[:, -keep:])
        return found, torch.zeros_like(found), None

    return get


def widened(values: list[list[float]], T: int) -> Tensor:
    return torch.tensor([each + [0.0] * (T - len(each)) for each in values])


def theirs_of(config: GrpoConfig, model: Any, rows: list[dict[str, Any]], A: Tensor, known: dict[str, Any]) -> Any:
    """Loss, gradients and metrics of TRL's trainer on given completions."""
    prompts, prompt_mask = padded([row["prompt"] for row in rows], True)
    ids, mask = padded([row["ids"] for row in rows], False)
    if config.mask_truncated:
        mask = mask * torch.tensor([[not row["truncated"]] for row in rows])
    inputs = {"prompt_ids": prompts, "prompt_mask": prompt_mask, "completion_ids": ids, "completion_mask": mask}
    inputs |= {"advantages": A.float(), "num_items_in_batch": mask.sum()}
    T = ids.shape[1]
    for name, their_name in (("old", "old_per_token_logps"), ("reference", "ref_per_token_logps")):
        if name in known:
            inputs[their_name] = widened(known[name], T)
    is_rloo = config.loss_type == "rloo"
    if is_rloo:
        inputs["old_logps"] = (widened(known["old"], T) * mask).sum(1)
    kind: Any = RLOOTrainer if is_rloo else GRPOTrainer
    settings = {
        "loss_type": "grpo" if config.loss_type == "gspo" else config.loss_type, "beta": config.beta,
        "importance_sampling_level": "sequence" if config.loss_type == "gspo" else "token",
        "epsilon_low": config.epsilon, "epsilon_high": config.high, "max_completion_length": config.max_completion_length,
        "_get_per_token_logps_and_entropies": their_log_probs(model, config.temperature),
    }  # fmt: skip
    self = trainer(kind, model.train(), **settings)
    if "weights" in known:
        self.use_vllm = self.vllm_importance_sampling_correction = True
        inputs["importance_sampling_ratio"] = widened(known["weights"], T)
    loss = kind._compute_loss(self, model, inputs)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), gradients, self._metrics["train"]


CASES = [
    {},
    {"loss_type": "grpo", "temperature": 0.7},
    {"loss_type": "bnpo"},
    {"loss_type": "dr_grpo", "scale_rewards": "none"},
    {"loss_type": "dapo", "epsilon_high": 0.28, "beta": 0.04, "temperature": 1.3},
    {"loss_type": "grpo", "beta": 0.1, "scale_rewards": "batch"},
    {"loss_type": "gspo", "epsilon": 3e-2, "epsilon_high": 4e-2},
    {"loss_type": "dapo", "mask_truncated": True},
    {"loss_type": "grpo", "mask_truncated": True},
    {"loss_type": "rloo"},
    {"loss_type": "rloo", "temperature": 0.9, "epsilon": 0.3},
]


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("more", CASES, ids=lambda more: "-".join(map(str, more.values())) or "default")
def test_losses_are_those_of_the_trainers(tiny_dir, saved, more, weighed):
    """With completions of an earlier model, so that ratios are clipped on both sides, and a reference of another one."""
    if weighed and (more.get("loss_type", "dapo") not in ("dapo", "grpo") or "mask_truncated" in more):
        pytest.skip("as the others")
    config = GrpoConfig(num_generations=N, max_completion_length=LONGEST, **more)
    model, rows = model_of(tiny_dir, config.temperature), completions()
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    known = {"old": [[v + 0.4 * (-1) ** i for i, v in enumerate(r)] for r in log_probs_of(model, rows)]}
    if config.beta:
        known["reference"] = log_probs_of(model_of(tiny_dir, config.temperature, seed=2), rows)
    if weighed:
        known["weights"] = [[0.5 + 0.1 * i for i in range(len(row["ids"]))] for row in rows]
    A = grpo_losses.advantages(rewards_of(rows), config).flatten()
    loss, gradients, metrics = theirs_of(config, theirs, rows, A, known)
    ours = step(config, model, [batch_of(rows, config, A, sampled=known["old"], **known)])
    assert ours[0] == pytest.approx(loss, rel=CLOSE, abs=CLOSE)
    assert_gradients_close(ours[1], gradients, ULPS)
    if config.loss_type not in ("rloo", "gspo"):  # theirs are per completion
        assert ours[2]["clipped"] == pytest.approx(metrics["clip_ratio/region_mean"][0], rel=CLOSE)
    assert 0.1 < ours[2]["clipped"] < 0.9
    if config.beta:
        assert ours[2]["kl"] == pytest.approx(metrics["kl"][0], rel=CLOSE)


def test_the_first_step_is_that_of_a_trainer_without_old_log_probabilities(tiny_dir, saved):
    config = GrpoConfig(num_generations=N)
    model, rows = model_of(tiny_dir), completions()
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    A = grpo_losses.advantages(rewards_of(rows), config).flatten()
    loss, gradients, _ = theirs_of(config, theirs, rows, A, {})
    ours = step(config, model, [batch_of(rows, config, A, sampled=log_probs_of(model, rows))])
    assert ours[0] == pytest.approx(loss, rel=CLOSE, abs=CLOSE) and ours[2]["clipped"] == 0
    assert_gradients_close(ours[1], gradients, ULPS)
    assert ours[2]["ratio"] == pytest.approx(1, abs=1e-6)


def with_gaps(rewards: Tensor) -> Tensor:
    found = rewards.clone()
    found[0, 1] = found[1, 0] = float("nan")
    found[2, 1:] = float("nan")
    return found


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_those_of_grpo_trainer(scale, gaps):
    rewards = with_gaps(rewards_of(completions())) if gaps else rewards_of(completions())
    found = grpo_losses.advantages(rewards.float(), GrpoConfig(scale_rewards=scale))
    flat = rewards.float()
    expected = flat - flat.nanmean(1, keepdim=True)
    if scale != "none":  # grpo_trainer.py, _generate_and_score_completions
        std = nanstd(flat, dim=1)[:, None] if scale == "group" else nanstd(flat.flatten())
        expected = expected / (std + 1e-4)
    torch.testing.assert_close(found, expected.nan_to_num(0.0), rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("gaps", [False, True])
def test_advantages_are_those_of_rloo_trainer(gaps):
    rewards = with_gaps(rewards_of(completions())) if gaps else rewards_of(completions())
    found = grpo_losses.advantages(rewards.float(), GrpoConfig(loss_type="rloo"))
    flat = rewards.float()  # rloo_trainer.py, _generate_and_score_completions
    counts = (~flat.isnan()).sum(1, keepdim=True)
    baselines = (flat.nansum(1, keepdim=True) - flat) / (counts - 1)
    torch.testing.assert_close(found, (flat - baselines).nan_to_num(0.0), rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("more", CASES, ids=lambda more: "-".join(map(str, more.values())) or "default")
def test_a_step_does_not_depend_on_its_micro_batches(tiny_dir, more):
    """One of twelve, twelve of one, and an empty one at the end, as where processes have different numbers of completions."""
    config = GrpoConfig(num_generations=N, max_completion_length=LONGEST, **more)
    model, rows = model_of(tiny_dir, config.temperature), completions()
    known = {"old": [[v + 0.3 * (-1) ** i for i, v in enumerate(r)] for r in log_probs_of(model, rows)]}
    if config.beta:
        known["reference"] = log_probs_of(model_of(tiny_dir, config.temperature, seed=2), rows)
    A = grpo_losses.advantages(rewards_of(rows), config).flatten()

    def part(numbers: list[int]) -> Any:
        values = {name: [each[i] for i in numbers] for name, each in known.items()}
        chosen = [rows[i] for i in numbers]
        return batch_of(chosen, config, A[numbers], sampled=values["old"], **values)

    empty = batch_of([{"prompt": [], "ids": [], "truncated": False}], config, torch.zeros(1))
    if config.beta:
        empty["reference"] = torch.zeros(empty["tokens"].shape)
    whole = step(config, model, [part(list(range(len(rows))))])
    single = step(config, model, [*(part([i]) for i in range(len(rows))), empty])
    assert single[0] == pytest.approx(whole[0], rel=CLOSE, abs=1e-6)
    assert_gradients_close(single[1], whole[1], ULPS)
    for name in whole[2]:
        assert single[2][name] == pytest.approx(whole[2][name], rel=1e-4, abs=1e-6), name
