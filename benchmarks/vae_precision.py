"""Measures the error that the VAE's precision makes in latents and images, against fp32, on a CPU.

    python -m benchmarks.vae_precision [--num-images 4] [--pixels 64] [--out benchmark-output]

The miniature's VAE, which is trained, and one of SDXL's real size with random weights. bf16 is
computed by the CPU. TF32, which only GPUs have, is emulated: what goes into convolutions
and matrix products is rounded to TF32's 10 bits of mantissa, and sums are fp32, as on a GPU. It is
rounded to nearest, as cuDNN does it, and once more cut off, which is the worst that may happen.
"""

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.full_base import CONFIGS
from benchmarks.report import keep, machine, show
from sdxl.base import MINIATURE_FOLDER, open_base
from sdxl.load import load_vae
from sdxl.sampling import decode_latents, scale_mean
from tools.draw_images import draw_images

AT_ONCE = 2  # images
# The first of two numbers is where the matrices are among an operation's arguments.
PRODUCTS = {
    torch.ops.aten.convolution.default: (0, 1),
    torch.ops.aten.mm.default: (0, 1),
    torch.ops.aten.bmm.default: (0, 1),
    torch.ops.aten.addmm.default: (1, 2),
    torch.ops.aten.baddbmm.default: (1, 2),
}
DROPPED_BITS = 13  # of fp32's 23 bits of mantissa


def to_tf32(tensor: torch.Tensor, *, cut_off: bool = False) -> torch.Tensor:
    """fp32 numbers with TF32's mantissa: the nearest ones, or, ``cut_off``, those towards 0."""
    bits = tensor.contiguous().view(torch.int32)
    half = 0 if cut_off else 1 << (DROPPED_BITS - 1)
    return ((bits + half) & -(1 << DROPPED_BITS)).view(torch.float32)


class Tf32(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Convolutions and matrix products as in TF32. Attention must be made of such products."""

    def __init__(self, *, cut_off: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cut_off, self.num_products = cut_off, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            self.num_products += 1
            rounded = [*args]
            for place in PRODUCTS[func]:
                rounded[place] = to_tf32(args[place], cut_off=self.cut_off)
            args = tuple(rounded)
        else:  # in inference mode operations come whole, and are made of others
            with self:
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return func(*args, **(kwargs or {}))


WAYS: dict[str, tuple[torch.dtype, Callable[[], AbstractContextManager[object]]]] = {
    "fp32": (torch.float32, nullcontext),
    "tf32": (torch.float32, Tf32),
    "tf32, cut off": (torch.float32, lambda: Tf32(cut_off=True)),
    "bf16": (torch.bfloat16, nullcontext),
}


@torch.inference_mode()
def real_size_vae(pixels: torch.Tensor) -> Any:
    """SDXL's VAE with torch's random weights. The last layers of both halves are scaled so that
    the latents of these pixels, and what they decode to, spread as a trained VAE's do."""
    torch.manual_seed(0)
    kind: Any = AutoencoderKL
    vae = kind.from_config(kind.load_config(CONFIGS / "vae")).eval()
    latents = vae.encode(pixels).latent_dist.mean
    spread = latents.std(dim=(0, 2, 3)).view(-1, 1, 1, 1) * vae.config.scaling_factor
    channels = len(spread)
    vae.quant_conv.weight[:channels] /= spread
    vae.quant_conv.bias[:channels] = 0
    decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample
    vae.decoder.conv_out.weight /= 2 * decoded.std()  # images in -1..1 have a std of about 0.5
    return vae


@torch.inference_mode()
def compare(vae: Any, pixels: torch.Tensor) -> list[dict[str, Any]]:
    """A row for each precision; ``pixels`` [N, 3, H, W] in -1..1. The vae ends in bf16."""
    vae.set_attn_processor(AttnProcessor())
    exact: dict[str, torch.Tensor] = {}
    rows = []
    for name, (dtype, way) in WAYS.items():
        vae.to(dtype)
        with way():
            latents = _encode(vae, pixels)
            exact.setdefault("latents", latents)
            parts = torch.split(exact["latents"], AT_ONCE)
            images = torch.cat([decode_latents(vae, part) for part in parts])
        levels = (images * 255).round()
        exact.setdefault("levels", levels)
        spread = exact["latents"].std(dim=(0, 2, 3)).view(-1, 1, 1)
        errors = (latents - exact["latents"]) / spread
        off = (levels - exact["levels"]).abs()
        rows.append(
            {
                "precision": name,
                "latents, rms error in % of std": 100 * float(errors.square().mean().sqrt()),
                "largest": 100 * float(errors.abs().max()),
                "decoded, most levels of 255": int(off.nan_to_num(255).max()),
                "% of values off by 1": 100 * float((off == 1).float().mean()),
                "% by more": 100 * float((off.nan_to_num(255) > 1).float().mean()),
            }
        )
    return rows[1:]


def _encode(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Scaled means [N, C, h, w], fp32."""
    parts = torch.split(pixels.to(vae.dtype), AT_ONCE)
    means = torch.cat([vae.encode(part).latent_dist.mean.float() for part in parts])
    return scale_mean(vae.config, means)


def drawn_pixels(num_images: int, side: int) -> torch.Tensor:
    """Drawn images with some noise, since drawings alone are smooth: [N, 3, side, side]."""
    with tempfile.TemporaryDirectory() as folder:
        draw_images(Path(folder), 3 * num_images, side)
        images = [Image.open(path) for path in sorted(Path(folder).glob("*.png"))]
        squares = [np.asarray(image) for image in images if image.size == (side, side)]
        for image in images:
            image.close()
    pixels = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float() / 127.5 - 1
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    return (pixels + noise / 10).clamp(-1, 1)


@click.command()
@click.option("--num-images", default=4, show_default=True)
@click.option("--pixels", "side", default=64, show_default=True)
@click.option("--out", default=Path("benchmark-output"), type=click.Path(path_type=Path))
def main(num_images: int, side: int, out: Path) -> None:
    """Errors of latents and of decoded images by the VAE's precision."""
    pixels = drawn_pixels(num_images, side)
    miniature = load_vae(open_base(str(MINIATURE_FOLDER)).vae, torch.float32)
    rows = {}
    for name, vae in (("miniature", miniature), ("real size, random", real_size_vae(pixels))):
        rows[name] = compare(vae, pixels)
        show(f"{name}: {num_images} images of {side} px, against fp32", rows[name])
    keep(out / "vae_precision.json", {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
