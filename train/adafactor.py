"""Adafactor (Shazeer and Stern, https://arxiv.org/abs/1804.04235) as torch has it, bit for bit on a
CPU, for whole lists of weights at once and without a value that the host must wait for.

torch's reads two norms of every weight from the device. Here what is one number a weight stays
there, as [n] fp64 (fp32 where a device has none) for n weights. Weights are taken so many at once
that what lives for the step is no more than that of the largest weight.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch

GROUP_NUMEL = 1 << 24  # elements at once, if no weight has more (one of SDXL has 29.5 million)


def groups_of(parameters: Iterable[torch.Tensor]) -> Iterator[list[Any]]:
    """The same in order, in lists of at most GROUP_NUMEL elements (or one tensor)."""
    group: list[torch.Tensor] = []
    numel = 0
    for parameter in parameters:
        if group and numel + parameter.numel() > GROUP_NUMEL:
            yield group
            group, numel = [], 0
        group.append(parameter)
        numel += parameter.numel()
    if group:
        yield group


class Adafactor(torch.optim.Optimizer):
    """State by weight: ``step``, and ``row_var`` and ``col_var`` (means of the squared gradient
    over each of the last two dimensions) or, of vectors, ``variance``; all fp32 on the device.

    A step is skipped where ``found_inf`` (0 or 1, a scalar on the device) says so: weights and
    state then keep every bit.
    """

    _step_supports_amp_scaling = True  # by ``found_inf``, as of torch's fused optimizers
    found_inf: torch.Tensor | None = None

    def __init__(self, parameters: Iterable[torch.Tensor], lr: float, weight_decay: float) -> None:
        defaults = {
            "lr": lr,
            "beta2_decay": -0.8,
            "eps": (None, 1e-3),  # the first is that of the dtype
            "d": 1.0,  # what an update's root mean square is clipped to
            "weight_decay": weight_decay,
        }
        super().__init__(parameters, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for parameter, values in self.state.items():  # of torch's own the step is on the CPU
            values["step"] = values["step"].to(parameter.device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """With the gradients that are there, which are left as they are."""
        for settings in self.param_groups:
            ready = [p for p in settings["params"] if p.grad is not None]
            for alike in ([p for p in ready if p.dim() > 1], [p for p in ready if p.dim() < 2]):
                for parameters in groups_of(alike):
                    states = [self._state_of(parameter) for parameter in parameters]
                    _step_group(parameters, states, settings, self.found_inf)

    def _state_of(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            shape = list(parameter.shape)
            if len(shape) > 1:
                state["row_var"] = parameter.new_zeros([*shape[:-1], 1])
                state["col_var"] = parameter.new_zeros([*shape[:-2], 1, shape[-1]])
            else:
                state["variance"] = torch.zeros_like(parameter)
        return state


def _step_group(
    parameters: list[torch.Tensor],
    states: list[dict[str, torch.Tensor]],
    settings: dict[str, Any],
    found_inf: torch.Tensor | None,
) -> None:
    """Of matrices (or what has more dimensions) alone, or of vectors alone."""
    lr, d, (_, eps2) = settings["lr"], settings["d"], settings["eps"]
    eps1 = torch.finfo(parameters[0].dtype).eps
    device = parameters[0].device
    grads: list[Any] = [parameter.grad for parameter in parameters]
    finite = torch.ones((), dtype=torch.bool, device=device)
    if found_inf is not None:
        finite = found_inf == 0
        grads = [torch.where(finite, grad, 0.0) for grad in grads]

    steps = [state["step"] for state in states]
    torch._foreach_add_(steps, [finite.float()] * len(steps))  # one for all would be read
    step = torch.stack(steps).to(torch.float32 if device.type == "mps" else torch.float64)
    share = torch.where(finite, step ** settings["beta2_decay"], 0.0).float()  # 1 - beta2, [n]
    size = _root_mean_squares(parameters, step.dtype).clamp_(min=eps2)
    rate = size * (step**-0.5).clamp_(max=lr)

    if settings["weight_decay"]:
        kept = torch.where(finite, 1 - lr * settings["weight_decay"], 1.0)
        torch._foreach_mul_(parameters, kept)
    updates = _variances(grads, states, share.unbind(), eps1)
    torch._foreach_clamp_min_(updates, eps1 * eps1)
    torch._foreach_rsqrt_(updates)
    torch._foreach_mul_(updates, grads)
    rate /= (_root_mean_squares(updates, step.dtype) / d).clamp_(min=1.0)
    rate = torch.where(finite, -rate, 0.0).float()
    for parameter, update, factor in zip(parameters, updates, rate.unbind(), strict=True):
        parameter.addcmul_(update, factor)


def _root_mean_squares(tensors: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """[n]"""
    norms = torch.stack(torch._foreach_norm(tensors)).to(dtype)
    torch._foreach_div_(norms.unbind(), [math.sqrt(tensor.numel()) for tensor in tensors])
    return norms


def _variances(
    grads: list[torch.Tensor],
    states: list[dict[str, torch.Tensor]],
    shares: tuple[torch.Tensor, ...],
    eps1: float,
) -> list[torch.Tensor]:
    """Estimates of the squared gradients, by the state once it has taken ``grads``; new tensors."""
    if grads[0].dim() < 2:
        variances = [state["variance"] for state in states]
        torch._foreach_lerp_(variances, torch._foreach_mul(grads, grads), shares)
        return [variance.clone() for variance in variances]
    for name, dim in (("row_var", -1), ("col_var", -2)):
        means = [grad.norm(dim=dim, keepdim=True) for grad in grads]
        torch._foreach_mul_(means, means)
        torch._foreach_div_(means, [grad.size(dim) for grad in grads])
        torch._foreach_lerp_([state[name] for state in states], means, shares)
    # A broadcast product: a matrix product would be one of 1.6 million 3x1 by 1x3 matrices where
    # the weight is of a 3x3 convolution.
    estimates = [state["row_var"] * state["col_var"] for state in states]
    means = [state["row_var"].mean(dim=-2, keepdim=True) for state in states]
    torch._foreach_clamp_min_(means, eps1)
    torch._foreach_div_(estimates, means)
    return estimates
