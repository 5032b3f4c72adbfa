"""Fused backward: each weight is stepped as soon as its gradient is there, which then goes.

So there is never more than a few gradients at a time. For one process without accumulation;
clipping is of each parameter alone, as the norm over all is known too late.
"""

from collections.abc import Callable
from typing import Any

import torch

from train.optim import Slot


class FusedBackward:
    """Hooks on the parameters of ``slots``. ``arm`` it before each backward pass that steps."""

    def __init__(self, slots: list[Slot], max_norm: float, device: torch.device) -> None:
        self.max_norm, self.device = max_norm or float("inf"), device
        self.armed = False
        for slot in slots:
            parameter: Any = slot.parameter
            parameter.register_post_accumulate_grad_hook(self._hook_of(slot))

    def arm(self, step: int, lr: float, finite: torch.Tensor) -> None:
        """The next backward pass is optimizer step ``step``, left out unless ``finite``."""
        self.step, self.lr, self.finite = step, lr, finite
        self._squares = torch.zeros((), device=self.device)
        self.armed = True

    def disarm(self) -> torch.Tensor:
        """After the backward pass: the norm of the whole gradient, before clipping."""
        self.armed = False
        return self._squares.sqrt()

    def _hook_of(self, slot: Slot) -> Callable[[torch.Tensor], None]:
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
