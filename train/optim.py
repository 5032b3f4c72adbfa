"""Optimizers, fused backward, and the learning rate as a function of the step.

A step whose gradient is not finite leaves the weights as they are; of fused backward, those whose
gradients come after the one that is not finite.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from typing import Any

import torch

from shards.plan import derive_key
from train.adafactor import GROUP_NUMEL, Adafactor, groups_of
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
        return lambda ps: Adafactor(ps, lr, decay)
    try:
        if config.optimizer == "adamw8bit":
            adamw8bit = _unsynchronized_adamw8bit()
            return lambda ps: adamw8bit(ps, lr=lr, weight_decay=decay)
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


def _unsynchronized_adamw8bit() -> Any:
    """bitsandbytes' AdamW8bit without a wait for the card after each weight. Paged state, which
    is not used here, would need one: all else is in the order of the stream.

    Raises:
        ImportError: it is not installed.
    """
    from bitsandbytes.optim import AdamW8bit

    class UnsynchronizedAdamW8bit(AdamW8bit):  # type: ignore[misc]
        @torch.no_grad()
        def step(self, closure: None = None) -> None:
            for number, group in enumerate(self.param_groups):
                for place, parameter in enumerate(group["params"]):
                    if parameter.grad is None:
                        continue
                    if not self.state[parameter]:
                        self.init_state(group, parameter, number, place)
                    self.update_step(group, parameter, number, place)

    return UnsynchronizedAdamW8bit


def supports_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it can be told on the device to skip a step: torch's fused ones and Adafactor."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def step_if(optimizer: torch.optim.Optimizer, lr: float, finite: torch.Tensor) -> None:
    """A step at ``lr`` if ``finite`` (a bool scalar on the device).

    Where the optimizer can be told on the device, the host does not wait; of others the flag is
    read.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    if supports_found_inf(optimizer):
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif bool(finite):
        optimizer.step()


def stochastic_round_(
    targets: list[torch.Tensor], values: list[torch.Tensor], seeds: list[int]
) -> None:
    """Round fp32 ``values`` to bf16 ``targets``, each by a seed of its own: up or down at random so
    that the mean is kept.

    Values that are bf16 already stay. (Without it updates below 1/256 of a weight are lost.)
    """
    sizes, device = [value.numel() for value in values], values[0].device
    rounded = torch.empty(sum(sizes), dtype=torch.int32, device=device)
    parts = [
        part.view(value.shape)
        for part, value in zip(torch.split(rounded, sizes), values, strict=True)
    ]
    generator = torch.Generator(device)
    for part, seed in zip(parts, seeds, strict=True):
        part.random_(0, 1 << 16, generator=generator.manual_seed(seed))
    torch._foreach_add_(parts, [value.view(torch.int32) for value in values])
    rounded &= MASK_OF_BF16
    torch._foreach_copy_(targets, [part.view(torch.float32) for part in parts])


class Optimizer:
    """The run's optimizer, over all its parameters.

    With ``--pure-bf16`` and ``--fused-backward`` it steps them in groups. A bf16 parameter is
    stepped in an fp32 copy that lives for the step of its group, and rounded back. What comes out
    of a parameter does not depend on those that are in its group.
    """

    def __init__(
        self,
        parameters: dict[str, torch.nn.Parameter],
        config: TrainConfig,
        device: torch.device,
    ) -> None:
        self.parameters, self.seed = parameters, config.seed
        self.keeps_gradients = False  # as zeros between steps: CUDA graphs add to them
        self.in_groups = config.pure_bf16 or config.fused_backward
        self._numbers = {parameter: number for number, parameter in enumerate(parameters.values())}
        self._stepped = {parameter: _stepped(parameter) for parameter in parameters.values()}
        self.torch_optimizer = optimizer_maker(config, device)(self._stepped.values())

    def step(self, step: int, lr: float, finite: torch.Tensor) -> None:
        """Optimizer step ``step`` with the gradients that are there, if ``finite``."""
        if not self.in_groups:
            step_if(self.torch_optimizer, lr, finite)
            return
        for group in groups_of(self.parameters.values()):
            self.step_group(group, step, lr, finite)

    @torch.no_grad()
    def step_group(
        self,
        group: list[torch.nn.Parameter],
        step: int,
        lr: float,
        finite: torch.Tensor,
        factors: torch.Tensor | None = None,
    ) -> None:
        """Use up the gradients of some parameters, each times its factor of [n] fp32, in optimizer
        step ``step``. Nothing waits for the device."""
        stepped = [self._stepped[parameter] for parameter in group]
        half_weights = [p for p, fp32 in zip(group, stepped, strict=True) if p is not fp32]
        if half_weights:
            _copy_to_fp32(group, stepped)
        grads: list[Any] = [parameter.grad for parameter in stepped]
        if factors is not None:
            torch._foreach_mul_(grads, list(factors.unbind()))
        (settings,) = self.torch_optimizer.param_groups
        settings["params"], everything = stepped, settings["params"]
        try:
            if supports_found_inf(self.torch_optimizer):
                step_if(self.torch_optimizer, lr, finite)
            else:
                _step_and_undo(self.torch_optimizer, stepped, lr, finite)
        finally:
            settings["params"] = everything
        if half_weights:
            seeds = [
                derive_key("round", self.seed, step, self._numbers[parameter]) >> 65
                for parameter in group
            ]
            stochastic_round_(list(group), [p.detach() for p in stepped], seeds)
        for parameter, fp32 in zip(group, stepped, strict=True):
            parameter.grad = fp32.grad = None
            if parameter is not fp32:
                fp32.data = parameter.new_empty(0, dtype=torch.float32)

    def zero_grad(self) -> None:
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        if self.keeps_gradients and gradients:
            torch._foreach_zero_(gradients)
            return
        for parameter in self.parameters.values():
            parameter.grad = None

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The tensors of the state by ``parameter|field``, and likewise its plain numbers."""
        tensors: dict[str, torch.Tensor] = {}
        numbers: dict[str, Any] = {}
        for name, parameter in self.parameters.items():
            # Not by ``state_dict``, in which bitsandbytes hides its tensors in a dict.
            for field, value in self.torch_optimizer.state.get(
                self._stepped[parameter], {}
            ).items():
                into = tensors if isinstance(value, torch.Tensor) else numbers
                into[f"{name}|{field}"] = value
        # Prodigy keeps what it has learned of the step size here.
        for name, value in self.torch_optimizer.param_groups[0].items():
            if type(value) in (int, float) and name not in ("lr", "weight_decay"):
                numbers[f"|{name}"] = value
        return tensors, numbers

    def load(self, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
        """Put ``state`` back, bit for bit."""
        fields: dict[str, dict[str, Any]] = {}
        for key, value in {**tensors, **numbers}.items():
            name, field = key.rsplit("|", 1)
            fields.setdefault(name, {})[field] = value
        (settings,) = self.torch_optimizer.state_dict()["param_groups"]
        settings.update(fields.pop("", {}))
        state = {
            number: {k: _laid_out(v, parameter) for k, v in fields[name].items()}
            for number, (name, parameter) in enumerate(self.parameters.items())
            if name in fields
        }
        self.torch_optimizer.load_state_dict({"state": state, "param_groups": [settings]})


def _stepped(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """What the optimizer steps in its place."""
    if parameter.dtype != torch.bfloat16:
        return parameter
    return torch.nn.Parameter(parameter.new_empty(0, dtype=torch.float32))


def _copy_to_fp32(group: list[torch.nn.Parameter], stepped: list[torch.nn.Parameter]) -> None:
    """Weights and gradients, which then go."""
    for parameter, fp32 in zip(group, stepped, strict=True):
        fp32.data = torch.empty_like(parameter, dtype=torch.float32)
        fp32.grad = torch.empty_like(fp32)
    torch._foreach_copy_([p.detach() for p in stepped], [p.detach() for p in group])
    grads: list[Any] = [parameter.grad for parameter in group]
    torch._foreach_copy_([cast.grad for cast in stepped if cast.grad is not None], grads)
    for parameter in group:
        parameter.grad = None


def _step_and_undo(
    optimizer: torch.optim.Optimizer,
    parameters: list[torch.nn.Parameter],
    lr: float,
    finite: torch.Tensor,
) -> None:
    """A step of an optimizer that cannot be told on the device to skip it: weights are put back."""
    before = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        assert parameter.grad is not None
        # Zeros for NaN: the state stays finite.
        parameter.grad = torch.where(finite, parameter.grad, 0.0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    for parameter, value in zip(parameters, before, strict=True):
        parameter.copy_(torch.where(finite, parameter, value))


def _laid_out(value: Any, parameter: torch.Tensor) -> Any:
    """A value of the parameter's shape in its memory order too (``--channels-last``): fused
    kernels walk both side by side."""
    if not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


# Fused backward: weights are stepped soon after their gradients are there, which then go, so that
# there are never more than a few gradients at a time. For one process without accumulation;
# clipping is of each parameter alone, as the norm over all is known too late.


class FusedBackward:
    """Hooks on the parameters of ``optimizer``. ``arm`` it before each backward pass that steps.

    Parameters wait for each other, in the order in which their gradients arrive, until they are a
    group: small ones are many, and a step of each alone costs the host more than the device.
    """

    def __init__(self, optimizer: Optimizer, max_norm: float) -> None:
        self.optimizer, self.max_norm = optimizer, max_norm
        self.armed = False
        for parameter in optimizer.parameters.values():
            hooked: Any = parameter
            hooked.register_post_accumulate_grad_hook(self._arrived)

    def arm(self, step: int, lr: float, finite: torch.Tensor) -> None:
        """The next backward pass is optimizer step ``step``, skipped unless ``finite``."""
        self.step, self.lr, self.finite = step, lr, finite
        self._waiting: list[torch.nn.Parameter] = []
        self._numel = 0
        self._norms: list[torch.Tensor] = []
        self.armed = True

    def disarm(self) -> torch.Tensor:
        """After the backward pass: the norm of the whole gradient, before clipping."""
        self._step_waiting()
        self.armed = False
        norm: torch.Tensor = torch.linalg.vector_norm(torch.cat(self._norms))
        return norm

    def _arrived(self, parameter: torch.nn.Parameter) -> None:
        if not self.armed:  # no step waits for it (a warm-up)
            parameter.grad = None
            return
        if self._numel + parameter.numel() > GROUP_NUMEL:
            self._step_waiting()
        self._waiting.append(parameter)
        self._numel += parameter.numel()

    @torch.no_grad()
    def _step_waiting(self) -> None:
        group, self._waiting, self._numel = self._waiting, [], 0
        if not group:
            return
        grads: list[Any] = [parameter.grad for parameter in group]
        norms = torch.stack(torch._foreach_norm(grads, dtype=torch.float32))
        self._norms.append(norms)
        factors = (self.max_norm / (norms + 1e-6)).clamp(max=1.0) if self.max_norm else None
        self.finite = self.finite & norms.isfinite().all()  # those that come later stay too
        self.optimizer.step_group(group, self.step, self.lr, self.finite, factors)
