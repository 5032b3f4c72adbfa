"""Optimizers, fused backward, and the learning rate as a function of the step.

A step whose gradient is not finite always leaves the weights as they are.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from typing import Any

import torch

from shards.plan import derive_key
from train.config import TrainConfig

Make = Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]
MASK_OF_BF16 = -65536  # the upper 16 bits of an fp32's 32


def learning_rate(config: TrainConfig, step: int, num_steps: int) -> float:
    """The learning rate of optimizer step 0..num_steps-1: linear warmup, then ``lr_schedule``."""
    peak, warmup = config.peak_lr, config.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    if config.lr_schedule == "linear":
        return peak * (1 - progress)
    if config.lr_schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    if config.lr_schedule == "cosine-restarts":
        return peak * 0.5 * (1 + math.cos(math.pi * (config.num_cycles * progress % 1.0)))
    return peak


def optimizer_maker(config: TrainConfig, device: torch.device) -> Make:
    """A function that makes the run's kind of optimizer over given parameters.

    Raises:
        ValueError: the package that it needs is not installed.
    """
    lr, decay = config.peak_lr, config.weight_decay
    if config.optimizer == "adamw":
        fused = device.type in ("cuda", "cpu")
        return lambda ps: torch.optim.AdamW(ps, lr=lr, weight_decay=decay, fused=fused)
    if config.optimizer == "adafactor":
        return lambda ps: torch.optim.Adafactor(ps, lr=lr, weight_decay=decay)
    try:
        if config.optimizer == "adamw8bit":
            from bitsandbytes.optim import AdamW8bit

            return lambda ps: AdamW8bit(ps, lr=lr, weight_decay=decay)
        from prodigyopt import Prodigy
    except ImportError as error:
        extra = {"adamw8bit": "8bit"}.get(config.optimizer, config.optimizer)
        raise ValueError(
            f"--optimizer {config.optimizer} needs a package more: pip install '.[{extra}]' "
            f"({error})"
        ) from error

    def prodigy(parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        with redirect_stdout(None):  # it prints
            optimizer: torch.optim.Optimizer = Prodigy(
                parameters,
                lr=lr,
                weight_decay=decay,
                use_bias_correction=True,
                safeguard_warmup=True,
            )
        return optimizer

    return prodigy


def supports_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it can skip a step by a flag on the device, as torch's fused optimizers do."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def step_if(optimizer: torch.optim.Optimizer, lr: float, finite: torch.Tensor) -> None:
    """A step at ``lr`` if ``finite`` (a bool scalar on the device).

    A fused optimizer reads the flag on the device, so that the host does not wait for it; for
    another kind the host reads it.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    if supports_found_inf(optimizer):
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif bool(finite):
        optimizer.step()


def stochastic_round_(
    target: torch.Tensor, values: torch.Tensor, generator: torch.Generator
) -> None:
    """Round fp32 ``values`` to bf16 ``target``, up or down at random so that the mean is kept.

    Values that are bf16 already stay. (Without it updates below 1/256 of a weight are lost.)
    """
    noise = torch.randint(
        0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator
    )
    bits = (values.view(torch.int32) + noise) & MASK_OF_BF16
    target.copy_(bits.view(torch.float32))


class PerParameterOptimizer:
    """One parameter with an optimizer of its own, for ``--pure-bf16`` and ``--fused-backward``.

    A bf16 parameter is stepped in an fp32 copy that lives for the step, and rounded back.
    """

    def __init__(self, number: int, parameter: torch.nn.Parameter, make: Make, seed: int) -> None:
        self.number, self.parameter, self.seed = number, parameter, seed
        self.is_half = parameter.dtype == torch.bfloat16
        empty = torch.empty(0, device=parameter.device)
        self.stepped = torch.nn.Parameter(empty) if self.is_half else parameter
        self.optimizer = make([self.stepped])

    @torch.no_grad()
    def step(self, step: int, lr: float, finite: torch.Tensor) -> None:
        """Use up the parameter's gradient in optimizer step ``step``."""
        parameter, stepped = self.parameter, self.stepped
        assert parameter.grad is not None
        skips_on_device = supports_found_inf(self.optimizer)
        before = None if skips_on_device or self.is_half else parameter.clone()
        if self.is_half:
            stepped.data = parameter.float()
            stepped.grad = parameter.grad.float()
            parameter.grad = None
        if not skips_on_device:
            assert stepped.grad is not None
            # Zeros for NaN: the state stays finite, and the weights are put back below.
            stepped.grad = torch.where(finite, stepped.grad, 0.0)
        step_if(
            self.optimizer, lr, finite if skips_on_device else finite.new_ones((), device="cpu")
        )
        if self.is_half:
            generator = torch.Generator(parameter.device)
            generator.manual_seed(derive_key("round", self.seed, step, self.number) >> 65)
            rounded = torch.empty_like(parameter)
            stochastic_round_(rounded, stepped.detach(), generator)
            parameter.copy_(torch.where(finite, rounded, parameter))
            stepped.data, stepped.grad = torch.empty(0, device=parameter.device), None
        elif before is not None:
            parameter.copy_(torch.where(finite, parameter, before))
        parameter.grad = None


class Optimizer:
    """The run's optimizer: one over all parameters, or a ``PerParameterOptimizer`` for each."""

    def __init__(
        self,
        parameters: dict[str, torch.nn.Parameter],
        config: TrainConfig,
        device: torch.device,
    ) -> None:
        make = optimizer_maker(config, device)
        self.parameters = parameters
        self.slots: list[PerParameterOptimizer] = []
        self.joint: torch.optim.Optimizer | None = None
        if config.pure_bf16 or config.fused_backward:
            values = enumerate(parameters.values())
            self.slots = [
                PerParameterOptimizer(number, p, make, config.seed) for number, p in values
            ]
        else:
            self.joint = make(parameters.values())

    def step(self, step: int, lr: float, finite: torch.Tensor) -> None:
        """Optimizer step ``step`` with the present gradients, if ``finite``."""
        if self.joint is not None:
            step_if(self.joint, lr, finite)
        for slot in self.slots:
            slot.step(step, lr, finite)

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def parts(self) -> list[tuple[list[str], torch.optim.Optimizer]]:
        """Each torch optimizer with the names of its parameters, in the optimizer's order."""
        names = list(self.parameters)
        if self.joint is not None:
            return [(names, self.joint)]
        return [([name], slot.optimizer) for name, slot in zip(names, self.slots, strict=True)]

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The tensors of the state by ``parameter|field``, and likewise its plain numbers."""
        tensors: dict[str, torch.Tensor] = {}
        numbers: dict[str, Any] = {}
        for names, optimizer in self.parts():
            (group,) = optimizer.param_groups
            for name, parameter in zip(names, group["params"], strict=True):
                # Not by ``state_dict``, in which bitsandbytes hides its tensors in a dict.
                for field, value in optimizer.state.get(parameter, {}).items():
                    into = tensors if isinstance(value, torch.Tensor) else numbers
                    into[f"{name}|{field}"] = value
        if self.joint is not None:  # Prodigy keeps what it has learned of the step size here
            for name, value in self.joint.param_groups[0].items():
                if type(value) in (int, float) and name not in ("lr", "weight_decay"):
                    numbers[f"|{name}"] = value
        return tensors, numbers

    def load(self, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
        """Put ``state`` back, bit for bit."""
        fields: dict[str, dict[str, Any]] = {}
        for key, value in {**tensors, **numbers}.items():
            name, field = key.rsplit("|", 1)
            fields.setdefault(name, {})[field] = value
        of_group = fields.pop("", {})
        for names, optimizer in self.parts():
            groups = optimizer.state_dict()["param_groups"]
            for group in groups:
                group.update(of_group)
            state = {
                number: {k: _laid_out(v, self.parameters[name]) for k, v in fields[name].items()}
                for number, name in enumerate(names)
                if name in fields
            }
            optimizer.load_state_dict({"state": state, "param_groups": groups})


def _laid_out(value: Any, parameter: torch.Tensor) -> Any:
    """A value of the parameter's shape in its memory order too (``--channels-last``): fused
    kernels walk both side by side."""
    if not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


# Fused backward: each weight is updated as soon as its gradient is computed, which is then freed,
# so that only a few gradients exist at a time. It works in one process without accumulation; each
# parameter's gradient is clipped alone, as the norm over all is known too late.


class FusedBackward:
    """Hooks on the parameters of ``slots``. ``arm`` it before each backward pass that steps."""

    def __init__(
        self, slots: list[PerParameterOptimizer], max_norm: float, device: torch.device
    ) -> None:
        self.max_norm, self.device = max_norm or float("inf"), device
        self.armed = False
        for slot in slots:
            parameter: Any = slot.parameter
            parameter.register_post_accumulate_grad_hook(self._hook_of(slot))

    def arm(self, step: int, lr: float, finite: torch.Tensor) -> None:
        """The next backward pass is optimizer step ``step``, skipped unless ``finite``."""
        self.step, self.lr, self.finite = step, lr, finite
        self._squares = torch.zeros((), device=self.device)
        self.armed = True

    def disarm(self) -> torch.Tensor:
        """After the backward pass: the norm of the whole gradient, before clipping."""
        self.armed = False
        return self._squares.sqrt()

    def _hook_of(self, slot: PerParameterOptimizer) -> Callable[[torch.Tensor], None]:
        def arrived(parameter: torch.Tensor) -> None:
            if not self.armed:  # no step waits for it (a warm-up)
                parameter.grad = None
                return
            grad = parameter.grad
            assert grad is not None
            norm = torch.linalg.vector_norm(grad, dtype=torch.float32)
            self._squares += norm.square()
            grad.mul_((self.max_norm / (norm + 1e-6)).clamp(max=1.0))
            self.finite = self.finite & norm.isfinite()  # those that come later stay too
            slot.step(self.step, self.lr, self.finite)

        return arrived
