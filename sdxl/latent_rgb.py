"""Maps from a scaled latent to preview colors, fitted by least squares.

A latent pixel stands for 8 x 8 image pixels: its channels, their products and a constant explain
its mean color well enough to see what a run is learning, without the VAE. (The linear map, without
the products, is what caches of earlier versions have. It draws a red heart in brown: its mean error
on held-out images was 15.9 of 255 levels where the quadratic one's is 11.1; docs/training.md.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

Matrix = npt.NDArray[np.float64]
Monomial = tuple[int, ...]  # channels that are multiplied, in order; () is 1
LINEAR_RIDGE, QUADRATIC_RIDGE = 1e-6, 1e-3  # the second is of each feature's own size


def monomials(channels: int, *degrees: int) -> list[Monomial]:
    """Products of so many latent channels, in a fixed order."""
    return [m for degree in degrees for m in combinations_with_replacement(range(channels), degree)]


@dataclass
class LatentSums:
    """Sums over latent pixels from which statistics and the maps follow, in fp64.

    ``gram`` [C+1, C+1] of (latent, 1) with itself, ``cross`` [C+1, 3] with the colors. For the
    quadratic map also ``moments``, of the ``monomials`` of degrees 3 and 4 [55 of 4 channels], and
    ``products`` [10, 3], of those of degree 2 with the colors: None where a sample of an earlier
    version is among them. They are summed over shards in a fixed order, so a cache's figures do not
    depend on which process wrote.
    """

    gram: Matrix
    cross: Matrix
    moments: Matrix | None = None
    products: Matrix | None = None

    @classmethod
    def empty(cls, channels: int) -> "LatentSums":
        return cls(
            np.zeros((channels + 1, channels + 1)),
            np.zeros((channels + 1, 3)),
            np.zeros(len(monomials(channels, 3, 4))),
            np.zeros((len(monomials(channels, 2)), 3)),
        )

    @property
    def channels(self) -> int:
        return len(self.gram) - 1

    def add(self, latents: torch.Tensor, colors: torch.Tensor) -> None:
        """Latents [N, C, h, w] (scaled) and the ``mean_colors`` [N, 3, h, w] of their images."""
        flat = latents.double().permute(0, 2, 3, 1).reshape(-1, latents.shape[1]).cpu().numpy()
        seen = colors.double().permute(0, 2, 3, 1).reshape(-1, 3).cpu().numpy()
        rows = np.concatenate([flat, np.ones((len(flat), 1))], axis=1)
        self.gram += rows.T @ rows
        self.cross += rows.T @ seen
        if self.moments is not None and self.products is not None:
            self.products += _values(flat, monomials(self.channels, 2)).T @ seen
            self.moments += _values(flat, monomials(self.channels, 3, 4)).sum(axis=0)

    def __add__(self, other: "LatentSums") -> "LatentSums":
        return LatentSums(
            self.gram + other.gram,
            self.cross + other.cross,
            _sum(self.moments, other.moments),
            _sum(self.products, other.products),
        )

    def to_json(self) -> dict[str, Any]:
        fields = {"gram": self.gram, "cross": self.cross}
        if self.moments is not None and self.products is not None:
            fields |= {"moments": self.moments, "products": self.products}
        return {name: values.tolist() for name, values in fields.items()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "LatentSums":
        """
        Raises:
            ValueError, KeyError, TypeError: not what ``to_json`` gives.
        """
        moments, products = value.get("moments"), value.get("products")
        sums = cls(np.array(value["gram"]), np.array(value["cross"]))
        if moments is not None and products is not None:
            sums.moments = np.array(moments, float).reshape(len(monomials(sums.channels, 3, 4)))
            sums.products = np.array(products, float).reshape(len(monomials(sums.channels, 2)), 3)
        return sums

    def statistics(self) -> dict[str, list[float]]:
        """Mean and standard deviation of each latent channel."""
        count = max(self.gram[-1, -1], 1.0)
        mean = self.gram[-1, :-1] / count
        variance = np.diag(self.gram)[:-1] / count - mean**2
        return {"mean": mean.tolist(), "std": np.sqrt(variance.clip(0)).tolist()}

    def fit(self) -> dict[str, Any]:
        """The maps to colors in -1..1: ``weight`` [C, 3] and ``bias`` [3] of the linear one.

        If all samples have the sums for it, there is also ``quadratic``, with the same fields and
        ``products`` [C(C+1)/2, 3].
        """
        ridge = LINEAR_RIDGE * np.eye(len(self.gram)) * max(float(np.trace(self.gram)), 1.0)
        solved = np.linalg.solve(self.gram + ridge, self.cross)
        fitted = {"weight": solved[:-1].tolist(), "bias": solved[-1].tolist()}
        if self.moments is not None and self.products is not None:
            return fitted | {"quadratic": self._fit_quadratic(self.moments, self.products)}
        return fitted

    def _fit_quadratic(self, moments: Matrix, products: Matrix) -> dict[str, Any]:
        """Against large products of latents that only few images have, each feature is held back by
        a ridge of its own size."""
        num = self.channels
        mean_of = dict(zip(monomials(num, 3, 4), moments, strict=True))
        linear = [*monomials(num, 1), ()]
        for row, first in enumerate(linear):
            for column, second in enumerate(linear):
                mean_of[tuple(sorted(first + second))] = self.gram[row, column]
        features = [*monomials(num, 2), *linear]
        gram = np.array([[mean_of[tuple(sorted(a + b))] for b in features] for a in features])
        ridge = np.diag(QUADRATIC_RIDGE * np.diag(gram) + 1e-9)
        solved = np.linalg.solve(gram + ridge, np.concatenate([products, self.cross])).tolist()
        end = len(products)
        return {"products": solved[:end], "weight": solved[end:-1], "bias": solved[-1]}


def _values(flat: Matrix, of: Sequence[Monomial]) -> Matrix:
    """The monomials of latent pixels [N, C]: [N, number of monomials]."""
    return np.stack([flat[:, monomial].prod(axis=1) for monomial in of], axis=1)


def _sum(first: Matrix | None, second: Matrix | None) -> Matrix | None:
    return None if first is None or second is None else first + second


def mean_colors(images: torch.Tensor) -> torch.Tensor:
    """The mean color of each latent pixel: images [N, 3, 8h, 8w] in -1..1 to [N, 3, h, w] fp32."""
    return F.adaptive_avg_pool2d(images.float(), (images.shape[-2] // 8, images.shape[-1] // 8))


def color_map(fitted: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The arguments of ``latents_to_rgb`` out of a manifest's ``latent_rgb``: of the quadratic map,
    or of the linear one where the cache has no other."""
    chosen = fitted.get("quadratic", fitted)
    names = ("weight", "bias", "products")
    return {name: torch.tensor(chosen[name]).float() for name in names if name in chosen}


def latents_to_rgb(
    latents: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    products: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scaled latents [N, C, h, w] to colors [N, 3, h, w] in 0..1, fp32, one for each latent pixel.

    ``weight`` [C, 3], ``bias`` [3] and ``products`` [C(C+1)/2, 3] are of ``LatentSums.fit``, whose
    maps give colors in -1..1.
    """
    latents, device = latents.float(), latents.device
    weight, bias = (part.to(device, torch.float32) for part in (weight, bias))
    colors = torch.einsum("nchw,cr->nrhw", latents, weight) + bias.view(1, 3, 1, 1)
    if products is not None:
        pairs = monomials(latents.shape[1], 2)
        squares = torch.stack([latents[:, i] * latents[:, j] for i, j in pairs], dim=1)
        colors = colors + torch.einsum("nphw,pr->nrhw", squares, products.to(device, torch.float32))
    return (colors / 2 + 0.5).clamp(0, 1)
