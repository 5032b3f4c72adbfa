"""A linear map from a scaled latent to preview colors, fitted by least squares.

A latent pixel stands for 8 x 8 image pixels: 4 channels and a constant explain its mean
color well enough to see what a run is learning, without the VAE.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

Matrix = npt.NDArray[np.float64]


@dataclass
class LatentSums:
    """Sums over latent pixels from which statistics and the map follow, in fp64.

    ``gram`` [C+1, C+1] of (latent, 1) with itself, ``cross`` [C+1, 3] with the colors. They are
    summed over shards in a fixed order, so a cache's figures do not depend on which process wrote.
    """

    gram: Matrix
    cross: Matrix

    @classmethod
    def empty(cls, channels: int) -> "LatentSums":
        return cls(np.zeros((channels + 1, channels + 1)), np.zeros((channels + 1, 3)))

    def add(self, latents: torch.Tensor, colors: torch.Tensor) -> None:
        """Latents [N, C, h, w] (scaled) and the ``mean_colors`` [N, 3, h, w] of their images."""
        flat = latents.double().permute(0, 2, 3, 1).reshape(-1, latents.shape[1]).cpu().numpy()
        seen = colors.double().permute(0, 2, 3, 1).reshape(-1, 3).cpu().numpy()
        rows = np.concatenate([flat, np.ones((len(flat), 1))], axis=1)
        self.gram += rows.T @ rows
        self.cross += rows.T @ seen

    def __add__(self, other: "LatentSums") -> "LatentSums":
        return LatentSums(self.gram + other.gram, self.cross + other.cross)

    def to_json(self) -> dict[str, Any]:
        return {"gram": self.gram.tolist(), "cross": self.cross.tolist()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "LatentSums":
        return cls(np.array(value["gram"]), np.array(value["cross"]))

    def statistics(self) -> dict[str, list[float]]:
        """Mean and standard deviation of each latent channel."""
        count = max(self.gram[-1, -1], 1.0)
        mean = self.gram[-1, :-1] / count
        variance = np.diag(self.gram)[:-1] / count - mean**2
        return {"mean": mean.tolist(), "std": np.sqrt(variance.clip(0)).tolist()}

    def fit(self) -> dict[str, Any]:
        """``weight`` [C, 3] and ``bias`` [3] of colors in -1..1."""
        ridge = 1e-6 * np.eye(len(self.gram)) * max(float(np.trace(self.gram)), 1.0)
        solved = np.linalg.solve(self.gram + ridge, self.cross)
        return {"weight": solved[:-1].tolist(), "bias": solved[-1].tolist()}


def mean_colors(images: torch.Tensor) -> torch.Tensor:
    """The mean color of each latent pixel: images [N, 3, 8h, 8w] in -1..1 to [N, 3, h, w] fp32."""
    return F.adaptive_avg_pool2d(images.float(), (images.shape[-2] // 8, images.shape[-1] // 8))


def latents_to_rgb(latents: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Scaled latents [N, C, h, w] to colors [N, 3, h, w] in 0..1, fp32, one for each latent pixel.

    ``weight`` [C, 3] and ``bias`` [3] are of ``LatentSums.fit``: the map gives colors in -1..1.
    """
    weight, bias = (part.to(latents.device, torch.float32) for part in (weight, bias))
    colors = torch.einsum("nchw,cr->nrhw", latents.float(), weight) + bias.view(1, 3, 1, 1)
    return (colors / 2 + 0.5).clamp(0, 1)
