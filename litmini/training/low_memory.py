"""Low-memory training: optimizer steps per parameter, in the backward pass, with offloaded state, or with stochastic rounding
of bf16 weights; activation checkpointing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from litmini.distributed.fsdp import blocks, is_dtensor
from litmini.errors import UserError
from litmini.ops.rounding import stochastic_round


class PerParameter(torch.optim.Optimizer):
    """Wraps an optimizer to step parameter by parameter: temporary tensors exist for one parameter at a time.

    Args:
        groups: parameter groups, as for any optimizer.
        make: groups -> the wrapped optimizer.
        rounding: step bf16 parameters in fp32, with moments in fp32, and round stochastically. The noise is a function of
            the parameter's index and its number of steps: the same on every rank and after resuming.
        in_backward: take the step of a parameter as soon as its gradient exists, and drop the gradient. This excludes
            accumulation, clipping and several ranks. Non-finite gradients are not used.
        offload: keep the moments in CPU memory between steps.

    Raises:
        UserError: the parameters are sharded.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        rounding: bool = False,
        in_backward: bool = False,
        offload: bool = False,
    ) -> None:
        super().__init__(groups, {})
        if any(is_dtensor(p) for group in self.param_groups for p in group["params"]):
            raise UserError("optim.stochastic_rounding, in_backward and offload do not go with --strategy fsdp.")
        self.in_backward, self.offload, self._is_paused = in_backward, offload, False
        self.squares: list[Tensor] = []  # squared gradient norms of the steps in one backward pass
        self._steps: dict[Tensor, int] = {}  # of each rounded parameter: on a GPU, the host would wait for its state's
        self._parts: dict[Tensor, tuple[int, torch.optim.Optimizer, Tensor, dict[str, Any]]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                exact = rounding and parameter.dtype is torch.bfloat16
                work = nn.Parameter(torch.empty(0, device=parameter.device)) if exact else parameter
                inner = make([{**group, "params": [work]}])
                self._parts[parameter] = (len(self._parts), inner, work, group)
                if in_backward:
                    parameter.register_post_accumulate_grad_hook(self._update)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take the step of every parameter that has a gradient; with `in_backward`, none has."""
        for parameter in self._parts:
            if parameter.grad is not None:
                self._update(parameter)

    def take_norm(self) -> float:
        """Return the norm of the gradients since the last call, with `in_backward`."""
        total = float(torch.stack(self.squares).sum().sqrt()) if self.squares else 0.0
        self.squares.clear()
        return total

    @contextmanager
    def without_steps(self) -> Iterator[None]:
        """Let backward passes drop gradients and change nothing."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    @torch.no_grad()
    def _update(self, parameter: Tensor) -> None:
        number, inner, work, group = self._parts[parameter]
        gradient = parameter.grad
        assert gradient is not None
        if self.in_backward:
            parameter.grad = None
            if self._is_paused:
                return
            self.squares.append(gradient.float().square().sum())
            if not self.squares[-1].isfinite():  # CPU-GPU sync point
                return
        if work is not parameter:
            self._steps[parameter] = self._steps_done(parameter) + 1
        # the learning rate of this step
        inner.param_groups[0].update({k: v for k, v in group.items() if k != "params"})
        state = self.state[parameter]  # of a paged optimizer, a copy on the device would not be paged
        inner.state[work] = {k: _to(v, gradient.device) for k, v in state.items()} if self.offload else dict(state)
        if work is not parameter:
            work.data, gradient = parameter.float(), gradient.float()
        work.grad = gradient
        inner.step()
        state = inner.state.pop(work)
        if work is not parameter:
            seed = hash((number, self._steps[parameter])) % 2**63
            generator = torch.Generator(parameter.device).manual_seed(seed)
            parameter.copy_(stochastic_round(work.data, torch.bfloat16, generator))
            work.data, work.grad = work.data.new_empty(0), None
        elif self.in_backward:
            work.grad = None
        self.state[parameter] = {k: _to(v, torch.device("cpu")) for k, v in state.items()} if self.offload else state

    def _steps_done(self, parameter: Tensor) -> int:
        """Return the number of a rounded parameter's steps, from its state at first: that of a resumed run has one."""
        if parameter not in self._steps:
            self._steps[parameter] = int(self.state[parameter].get("step", 0))  # CPU-GPU sync point
        return self._steps[parameter]


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def page(optimizer: Any, parameter: Tensor) -> None:
    """Move a parameter's moments into memory that bitsandbytes moves to the CPU when a GPU is full, as in a new run."""
    state = optimizer.state[parameter]
    for name in ("state1", "state2"):
        moments, state[name] = state[name], optimizer.get_state_buffer(parameter, dtype=state[name].dtype)
        state[name].copy_(moments)


def checkpoint_activations(model: nn.Module) -> None:
    """Let every `Block` of a model keep only its input for the backward pass and recompute the rest.

    Recomputed dropout masks are the same: the random state is preserved.
    """
    for module in blocks(model):
        module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)  # type: ignore[method-assign]
