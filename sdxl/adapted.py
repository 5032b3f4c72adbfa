"""What a LoRA learned of one module, whichever file it comes from."""

import math
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, eq=False)
class Adapted:
    """What is learned of one linear or convolution W: W + scale B A.

    ``down`` A [r, in] or [r, in, k, k], ``up`` B [out, r] or [out, r, 1, 1], ``magnitude`` (DoRA)
    [out]: the norm that each row of the sum is given.
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float
    rslora: bool = False
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def kohya_alpha(self) -> float:
        """alpha, where the strength is alpha / rank."""
        return self.alpha * math.sqrt(self.rank) if self.rslora else self.alpha

    def to(self, dtype: torch.dtype) -> "Adapted":
        """The same in ``dtype``."""
        magnitude = None if self.magnitude is None else self.magnitude.to(dtype)
        down, up = self.down.to(dtype), self.up.to(dtype)
        return replace(self, down=down, up=up, magnitude=magnitude)

    def delta(self) -> torch.Tensor:
        """scale B A in fp32, of the weight's shape."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return self.scale * product.reshape(len(self.up), *self.down.shape[1:])

    def merged(self, weight: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
        """W with this in it, in fp32: W + strength scale B A; with DoRA, each row of that at its
        magnitude (Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", eq. 5)."""
        whole = weight.float() + strength * self.delta()
        if self.magnitude is None:
            return whole
        norms = whole.flatten(1).norm(dim=1)
        rows = (self.magnitude.float() / norms).reshape(-1, *[1] * (whole.ndim - 1))
        merged: torch.Tensor = rows * whole
        return merged
