"""Checks what encode stores against the bare VAE, by a second, independent code path.

Latents that are encoded without the images' normalization train with losses that look as usual.
So built-in drawings go through the whole stage and, from their 8-bit pixels, through diffusers'
VAE alone with a scaling of its own; and the stored latents of a few images are compared with those
that the VAE alone gives for their files. The stage is measured by the VAE, not by an ideal: a VAE
of random weights raises no alarm. Which images are taken, and what is measured, follows from the
cache's contents alone, whoever encoded it and in however many runs.

Legend: C latent channels, h w latent height and width.
"""

import heapq
import io
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw

from precompute.encoders import Encoders, LatentEncoder, Posterior
from precompute.images.decode import ORIENTATION, open_image
from precompute.images.variants import render
from precompute.plan.placement import PlannedSample, ShardPlan
from runtime.files import content_digest
from shards.buckets import Geometry, cover
from shards.format import CacheError
from shards.index import Index
from shards.manifest import read_manifest
from shards.reader import Shard

Pixels = npt.NDArray[np.uint8]
NUM_CHECKED = 3  # images
NUM_CANDIDATES = 16  # some may have been rejected, or cannot be compared
SIDE = 64  # of a drawing, pixels
WINDOW = 16  # latent pixels: the middle of an image, which is decoded back
MAX_ERROR = 0.1  # of the latents' norm; storing in bf16 costs 0.002, a VAE in bf16 about 0.01
MAX_STD_FACTOR = 1.25  # of the posterior's std, which in half precision is known less well
NEGLIGIBLE_ERROR = 0.01  # latents this close decode to the same image
MAX_PSNR_LOSS = 1.0  # dB
SPREAD = (0.2, 5.0)  # standard deviation of scaled latents: the UNet expects about 1


@dataclass(frozen=True, eq=False)
class Candidate:
    """An image that may be checked, and the shard it is in."""

    shard: str
    planned: PlannedSample

    @property
    def key(self) -> str:
        return self.planned.record.key


def choose_candidates(shards: Iterable[ShardPlan]) -> list[Candidate]:
    """The images of a cache that may be checked: the first ones in key order whose latents are not
    imported."""
    members = (
        Candidate(shard.name, member)
        for shard in shards
        for member in shard.members
        if member.latents_file is None
    )
    return heapq.nsmallest(NUM_CANDIDATES, members, key=lambda candidate: candidate.key)


def earlier_checks(folder: Path) -> dict[str, Any]:
    """The checks that the manifest of a finished cache records; empty where there is none."""
    try:
        return dict(read_manifest(folder).get("sanity", {}))
    except CacheError:
        return {}


def check_cache(
    folder: Path,
    recipe: dict[str, Any],
    candidates: list[Candidate],
    fingerprints: dict[str, list[Any]],
    before: dict[str, Any],
    encoders: Encoders,
) -> dict[str, Any]:
    """The manifest's ``sanity`` entry; warns of measures out of bounds.

    ``fingerprints`` are by key. ``before`` is the entry of an earlier run: it is kept, and the VAE
    is not loaded, if it is of the same images and was made in the same way.
    """
    parts = [recipe[name] for name in ("preprocessing", "vae", "storage")]
    digest = content_digest(
        [*parts, *([candidate.key, *fingerprints[candidate.key][:3]] for candidate in candidates)]
    )
    if before.get("of") != digest:
        measured = (_check_image(folder, candidate, encoders) for candidate in candidates)
        images = [*islice((image for image in measured if image is not None), NUM_CHECKED)]
        before = {"of": digest, "drawings": _drawings(encoders), "pictures": images}
    _warn(alarms_of_drawings(before["drawings"]))
    _warn(line for image in before["pictures"] for line in alarms_of_image(image))
    return before


def check_drawings(encoders: Encoders) -> None:
    """Warn if the built-in drawings do not become the latents that the VAE alone gives."""
    _warn(alarms_of_drawings(_drawings(encoders)))


def _drawings(encoders: Encoders) -> dict[str, Any]:
    """The measures of the built-in drawings, which a run encodes once."""
    if encoders.drawing_measures is None:
        encoders.drawing_measures = measure_drawings(encoders.latents)
    return encoders.drawing_measures


def _warn(lines: Iterable[str]) -> None:
    for line in lines:
        warnings.warn(f"DO NOT TRAIN ON THIS CACHE: {line}", stacklevel=1)


def _check_image(folder: Path, candidate: Candidate, encoders: Encoders) -> dict[str, Any] | None:
    """Measure one image; None where it was rejected, or is of a kind that cannot be compared."""
    record = candidate.planned.record
    index = Index(folder / f"{candidate.shard}.index")
    row = int(np.searchsorted(index.records["key"], record.key.encode()))
    if row == len(index) or index.key(row) != record.key:
        return None
    if index.records["num_variants"][row] != len(candidate.planned.variants):
        return None  # which of them were dropped is not known here
    try:
        data = record.image.read()
    except (OSError, ValueError):  # gone or changed since
        return None
    stored = torch.empty(index.layout.latent)
    Shard(folder, candidate.shard, index.sha256).read_into(stored, row, "latents.mean")
    geometry = candidate.planned.variants[0]
    return measure_image(encoders.latents, record.path, data, geometry, stored)


def measure_drawings(encoder: LatentEncoder) -> dict[str, Any]:
    """Encode the built-in drawings and compare the latents with those of the VAE alone.

    ``error`` is how far the latents are from those of the VAE alone, as a share of their norm;
    ``scale`` and ``std_scale`` how many times as large they and the posterior's std are; ``mean``
    and ``std`` [C] of each latent channel; ``psnr`` of the drawings decoded back, in dB.
    """
    drawings = make_drawings()
    pixels = [render(open_image(_encode_png(drawing)), _uncropped(drawing)) for drawing in drawings]
    size = encoder.batch_size
    parts = [encoder.encode(pixels[first : first + size]) for first in range(0, len(pixels), size)]
    posterior = Posterior(torch.cat([p.mean for p in parts]), torch.cat([p.std for p in parts]))
    bare_mean, bare_std = _encode_independently(
        encoder.fp32_vae, torch.cat([_tensor(drawing) for drawing in drawings])
    )
    decoded = _decode_independently(encoder.fp32_vae, posterior.mean)
    wanted = torch.cat([_tensor(drawing) for drawing in drawings])
    return {
        "error": round(_error(posterior.mean, bare_mean), 4),
        "scale": round(_scale(posterior.mean, bare_mean), 3),
        "std_scale": round(_scale(posterior.std, bare_std), 3),
        "mean": [round(float(value), 2) for value in posterior.mean.mean(dim=(0, 2, 3))],
        "std": [round(float(value), 2) for value in posterior.mean.std(dim=(0, 2, 3))],
        "psnr": _psnr(decoded, wanted),
    }


def measure_image(
    encoder: LatentEncoder, path: str, data: bytes, geometry: Geometry, stored: torch.Tensor
) -> dict[str, Any] | None:
    """Compare one image's stored latents with the VAE's; None if the image cannot be compared.

    ``data`` is the file, ``stored`` [C, h, w] the cache's latents for ``geometry``. Only plain
    images can be opened by another way: 8 bits, RGB or gray, upright, opaque, without a profile.
    ``psnr`` is of the middle of the image, decoded from ``stored``; ``bare_psnr`` from the
    latents that the VAE alone gives, where those differ.
    """
    opened = _open_plainly(data)
    if opened is None:
        return None
    resized = np.asarray(opened.resize(geometry.resized, Image.Resampling.LANCZOS))
    _, _, top, left, height, width = geometry.sizes
    wanted = _tensor(resized[top : top + height, left : left + width])
    latents, (bare, _) = stored[None].float(), _encode_independently(encoder.fp32_vae, wanted)
    h, w = latents.shape[-2:]
    y, x = max(0, (h - WINDOW) // 2), max(0, (w - WINDOW) // 2)
    window = (..., slice(y, y + WINDOW), slice(x, x + WINDOW))
    part = (..., slice(8 * y, 8 * (y + WINDOW)), slice(8 * x, 8 * (x + WINDOW)))
    measures: dict[str, Any] = {
        "path": path,
        "error": round(_error(latents, bare), 4),
        "scale": round(_scale(latents, bare), 3),
        "psnr": _psnr(_decode_independently(encoder.fp32_vae, latents[window]), wanted[part]),
    }
    if measures["error"] > NEGLIGIBLE_ERROR:
        measures["bare_psnr"] = _psnr(
            _decode_independently(encoder.fp32_vae, bare[window]), wanted[part]
        )
    return measures


def alarms_of_drawings(measures: dict[str, Any]) -> list[str]:
    """What ``measure_drawings`` shows to be wrong, a line each; empty if all is as it should be."""
    lines = []
    if measures["error"] > MAX_ERROR:
        lines.append(
            f"built-in drawings become latents that are {measures['error']:.0%} off those of the "
            f"VAE alone ({measures['scale']:g} times as large): the encode stage is at fault"
        )
    if not 1 / MAX_STD_FACTOR <= measures["std_scale"] <= MAX_STD_FACTOR:
        lines.append(
            f"the posterior's std of built-in drawings is {measures['std_scale']:g} times that of "
            "the VAE alone: the encode stage is at fault"
        )
    spread = float(np.sqrt(np.mean(np.square(measures["std"]))))
    if not SPREAD[0] <= spread <= SPREAD[1]:
        lines.append(
            f"built-in drawings become latents of standard deviation {spread:.2g}, where a UNet "
            "expects about 1: is the scaling_factor in the VAE's config.json right?"
        )
    return lines


def alarms_of_image(measures: dict[str, Any]) -> list[str]:
    """What ``measure_image`` shows to be wrong, a line each."""
    lines = []
    if measures["error"] > MAX_ERROR:
        lines.append(
            f"{measures['path']}: its latents are {measures['error']:.0%} off those that the VAE "
            f"gives of the file opened by another way ({measures['scale']:g} times as large)"
        )
    if measures.get("bare_psnr", measures["psnr"]) - measures["psnr"] > MAX_PSNR_LOSS:
        lines.append(
            f"{measures['path']}: its latents decode to {measures['psnr']:g} dB of the image, "
            f"where those of the VAE alone come to {measures['bare_psnr']:g} dB"
        )
    return lines


def make_drawings() -> list[Pixels]:
    """Two drawings [SIDE, SIDE, 3]: shapes on a slope of colors, and stripes. No two channels
    are alike, and neither is symmetric."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / (SIDE - 1)
    slope = np.stack([0.9 * x, 0.2 + 0.6 * y, 0.8 - 0.7 * x * y], axis=-1)
    first = Image.fromarray((255 * slope).round().astype(np.uint8))
    pen = ImageDraw.Draw(first)
    pen.ellipse((7, 10, 33, 36), fill=(240, 60, 20))
    pen.rectangle((38, 5, 59, 29), fill=(30, 40, 200))
    pen.polygon([(15, 59), (52, 56), (41, 35)], fill=(250, 220, 40))
    second = Image.new("RGB", (SIDE, SIDE), (20, 90, 60))
    pen = ImageDraw.Draw(second)
    for number, start in enumerate(range(0, SIDE, 12)):
        color = ((230, 180, 150), (120, 20, 40), (10, 10, 20))[number % 3]
        pen.line((start, 0, SIDE - start // 2, SIDE), fill=color, width=2 + number)
    return [np.asarray(first), np.asarray(second)]


def _encode_png(pixels: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _uncropped(pixels: Pixels) -> Geometry:
    size = (pixels.shape[1], pixels.shape[0])
    return cover(size, size)


def _open_plainly(data: bytes) -> Image.Image | None:
    with Image.open(io.BytesIO(data)) as image:
        is_odd = {"icc_profile", "transparency"} & set(image.info)
        if image.mode not in ("RGB", "L") or is_odd or image.getexif().get(ORIENTATION, 1) != 1:
            return None
        return image.convert("RGB")


def _tensor(pixels: Pixels) -> torch.Tensor:
    """[H, W, 3] to what a VAE takes: [1, 3, H, W] in -1..1."""
    scaled = pixels.astype(np.float64) / 255 * 2 - 1
    return torch.from_numpy(scaled.transpose(2, 0, 1)[None].astype(np.float32))


def _constants(vae: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Shift and scale [1, C or 1, 1, 1], as diffusers' pipelines take them from the config."""
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is None or std is None:
        mean, std = [vae.config.get("shift_factor") or 0.0], [1.0]
    shift, spread = torch.tensor(mean).view(1, -1, 1, 1), torch.tensor(std).view(1, -1, 1, 1)
    return shift, vae.config["scaling_factor"] / spread


@torch.inference_mode()
def _encode_independently(vae: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled mean and std [N, C, h, w] fp32 on the CPU, of the VAE alone, one image at a time."""
    shift, scale = _constants(vae)
    posteriors = [vae.encode(image[None].to(vae.device, vae.dtype)).latent_dist for image in pixels]
    mean = torch.cat([posterior.mean.float().cpu() for posterior in posteriors])
    std = torch.cat([posterior.std.float().cpu() for posterior in posteriors])
    return (mean - shift) * scale, std * scale


@torch.inference_mode()
def _decode_independently(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    shift, scale = _constants(vae)
    plain = (latents / scale + shift).to(vae.device, vae.dtype)
    return torch.cat([vae.decode(latent[None]).sample.float().cpu() for latent in plain])


def _error(latents: torch.Tensor, bare: torch.Tensor) -> float:
    error = float((latents - bare).norm() / bare.norm().clamp_min(1e-12))
    return error if math.isfinite(error) else 1.0


def _scale(latents: torch.Tensor, bare: torch.Tensor) -> float:
    scale = float((latents * bare).sum() / bare.square().sum().clamp_min(1e-12))
    return scale if math.isfinite(scale) else 0.0


def _psnr(images: torch.Tensor, wanted: torch.Tensor) -> float:
    """PSNR in dB for images in -1..1; 0 for images that are not finite."""
    error = float(((images.clamp(-1, 1) - wanted) / 2).square().mean())
    return round(-10 * float(np.log10(max(error, 1e-10))), 2) if math.isfinite(error) else 0.0
