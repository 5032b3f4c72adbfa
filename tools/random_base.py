"""Makes a small SDXL with random weights, in diffusers' layout, for tests of every code path.

Shapes: B images, C channels, H W image or latent size.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:  # at run time torch is imported late, so that --help stays quick
    import torch

MERGES = [("t", "h"), ("th", "e</w>"), ("o", "n</w>"), ("r", "e"), ("re", "d</w>")]
WIDTH_1, WIDTH_2 = 32, 48  # the two text encoders' hidden sizes
# Not SDXL's 0.13025: code that forgets to read the config must fail on this model.
SCALING_FACTOR = 0.25


def make_random_base(folder: Path, seed: int = 0) -> None:
    """Write a model that ``StableDiffusionXLPipeline.from_pretrained(folder)`` loads as it is.

    The weights are float32 safetensors and depend on ``seed`` alone; the caller's random state is
    kept. Nothing is downloaded.
    """
    import torch
    from diffusers import StableDiffusionXLPipeline

    from tools.small_sdxl import EOS, make_scheduler, make_unet, write_tokenizer

    kind: Any = StableDiffusionXLPipeline  # annotated too partially for mypy --strict
    # Only the CPU generator is drawn from; torch.manual_seed would also reseed the accelerators.
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        tokenizer = write_tokenizer(folder / "tokenizer", MERGES, pad_token=EOS)
        vae = _vae()
        text_encoder, text_encoder_2 = _text_encoders(tokenizer)
        pipeline = kind(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=write_tokenizer(folder / "tokenizer_2", MERGES, pad_token="!"),
            unet=make_unet((16, 32, 64), (2, 2, 4), (WIDTH_1, WIDTH_2), time_embed_dim=16).eval(),
            scheduler=make_scheduler(),
            add_watermarker=False,
        )
    pipeline.save_pretrained(folder)


def _text_encoders(tokenizer: Any) -> tuple[Any, Any]:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    from tools.small_sdxl import spread_embeddings, text_config

    text_encoder = CLIPTextModel(text_config(tokenizer, WIDTH_1, 2, WIDTH_1, "quick_gelu"))
    spread_embeddings(text_encoder, position_std=0.2)
    text_encoder_2 = CLIPTextModelWithProjection(
        text_config(tokenizer, WIDTH_2, 3, WIDTH_2, "gelu")
    )
    spread_embeddings(text_encoder_2, position_std=0.2)
    return text_encoder, text_encoder_2


def _vae() -> Any:
    import torch

    from tools.small_sdxl import make_vae

    vae = make_vae((8, 8, 16, 16), scaling_factor=SCALING_FACTOR).eval()
    _calibrate(vae, torch.rand(32, 3, 6, 6))
    return vae


def _calibrate(vae: Any, tiles: "torch.Tensor") -> None:
    """Give latents unit variance once scaled, and decoded images a visible contrast.

    An untrained encoder's output is nearly constant, and drowned by a posterior std of about 1;
    both would hide an image's content from every test. ``tiles``: (B, 3, H, W) in [0, 1].
    """
    import torch

    images = torch.nn.functional.interpolate(tiles, scale_factor=16, mode="bilinear") * 2 - 1
    quant = vae.quant_conv
    quant.weight[4:] = 0  # the last four channels are the log-variance
    quant.bias[4:] = -8.0
    _rescale(quant, vae.encode(images).latent_dist.mean, std=1 / SCALING_FACTOR)
    latents = vae.encode(images).latent_dist.mean
    _rescale(vae.decoder.conv_out, vae.decode(latents).sample, std=0.5)


def _rescale(conv: "torch.nn.Conv2d", output: "torch.Tensor", std: float) -> None:
    """Fold into ``conv`` the map that gives its (B, C, H, W) output mean 0 and this std."""
    assert conv.bias is not None
    num_channels = output.shape[1]
    deviation, mean = output.std(dim=(0, 2, 3)), output.mean(dim=(0, 2, 3))
    factor = std / deviation
    conv.weight[:num_channels] *= factor[:, None, None, None]
    conv.bias[:num_channels] = (conv.bias[:num_channels] - mean) * factor


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def main(folder: Path, seed: int) -> None:
    """Write a small random-weight SDXL into FOLDER."""
    make_random_base(folder, seed)


if __name__ == "__main__":
    main()
