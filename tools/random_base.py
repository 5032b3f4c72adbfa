"""A small SDXL with random weights, in diffusers layout: every code path, none of the gigabytes.

Shapes: B pictures, C channels, H W picture or latent size.
"""

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:  # at run time torch is imported late, so that --help stays quick
    import torch
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MERGES = (("t", "h"), ("th", "e</w>"), ("o", "n</w>"), ("r", "e"), ("re", "d</w>"))
NUM_POSITIONS = 77
WIDTH_1, WIDTH_2 = 32, 48  # the two text encoders' hidden sizes
TIME_EMBED_DIM = 16
# Not SDXL's 0.13025: code that forgets to read the config must fail on this model.
SCALING_FACTOR = 0.25


def make_random_base(folder: Path, seed: int = 0) -> None:
    """Write a model that ``StableDiffusionXLPipeline.from_pretrained(folder)`` loads as it is.

    The weights are float32 safetensors and depend on ``seed`` alone; the caller's random state is
    kept. Nothing is downloaded.
    """
    import torch

    # Any: diffusers' annotations are too partial for mypy --strict.
    diffusers: Any = importlib.import_module("diffusers")
    # Only the CPU generator is drawn from; torch.manual_seed would also reseed the accelerators.
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        tokenizer = _tokenizer(pad_token=EOS)
        pipeline = diffusers.StableDiffusionXLPipeline(
            vae=_vae(diffusers),
            text_encoder=_text_encoder(tokenizer),
            text_encoder_2=_text_encoder_2(tokenizer),
            tokenizer=tokenizer,
            tokenizer_2=_tokenizer(pad_token="!"),
            unet=_unet(diffusers),
            scheduler=_scheduler(diffusers),
            add_watermarker=False,
        )
    pipeline.save_pretrained(folder)
    _write_vocabulary(folder / "tokenizer")
    _write_vocabulary(folder / "tokenizer_2")


def _vocabulary() -> dict[str, int]:
    """CLIP's order: 256 byte symbols ("!" is 0), those ending a word, merges, BOS, EOS."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    # Byte-level BPE writes the bytes that have no printable character as U+0100 and up.
    num_hidden = 256 - len(printable)
    symbols = [chr(code) for code in (*printable, *range(0x100, 0x100 + num_hidden))]
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols)]
    tokens += ["".join(pair) for pair in MERGES]
    return {token: index for index, token in enumerate([*tokens, BOS, EOS])}


def _tokenizer(pad_token: str) -> "CLIPTokenizer":
    from transformers import CLIPTokenizer

    merges: Any = list(MERGES)  # annotated list[str], yet pairs are what it takes
    return CLIPTokenizer(
        vocab=_vocabulary(),
        merges=merges,
        pad_token=pad_token,
        model_max_length=NUM_POSITIONS,
    )


def _write_vocabulary(folder: Path) -> None:
    """Add the two files SDXL itself ships; transformers 5 saves a tokenizer.json only."""
    vocabulary = json.dumps(_vocabulary(), ensure_ascii=False)
    (folder / "vocab.json").write_text(vocabulary, encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in MERGES)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _text_settings(tokenizer: "CLIPTokenizer", width: int, num_heads: int) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "projection_dim": width,
        "num_hidden_layers": 2,
        "num_attention_heads": num_heads,
        "max_position_embeddings": NUM_POSITIONS,
        # The real ids: with the default eos_token_id=2 CLIP pools by an old rule instead.
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _text_encoder(tokenizer: "CLIPTokenizer") -> "CLIPTextModel":
    from transformers import CLIPTextConfig, CLIPTextModel

    settings = _text_settings(tokenizer, WIDTH_1, num_heads=2)
    model = CLIPTextModel(CLIPTextConfig(**settings, hidden_act="quick_gelu"))
    _spread_embeddings(model)
    return model


def _text_encoder_2(tokenizer: "CLIPTokenizer") -> "CLIPTextModelWithProjection":
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    settings = _text_settings(tokenizer, WIDTH_2, num_heads=3)
    model = CLIPTextModelWithProjection(CLIPTextConfig(**settings, hidden_act="gelu"))
    _spread_embeddings(model)
    return model


def _spread_embeddings(model: "torch.nn.Module") -> None:
    """Widen CLIP's initial std of 0.02, with which every prompt would look almost the same."""
    import torch

    for name, std in (("token_embedding", 0.5), ("position_embedding", 0.2)):
        for path, part in model.named_modules():
            if path.endswith(name) and isinstance(part, torch.nn.Embedding):
                part.weight.normal_(std=std)


def _unet(diffusers: Any) -> Any:
    """SDXL's three levels: no attention in the first, twice the transformers in the last."""
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 2, 4),  # by diffusers' old misnomer: the number of heads
        norm_num_groups=8,
        cross_attention_dim=WIDTH_1 + WIDTH_2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_EMBED_DIM,
        projection_class_embeddings_input_dim=WIDTH_2 + 6 * TIME_EMBED_DIM,
    ).eval()


def _vae(diffusers: Any) -> Any:
    import torch

    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=SCALING_FACTOR,
        force_upcast=True,
    ).eval()
    _calibrate(vae, torch.rand(32, 3, 6, 6))
    return vae


def _calibrate(vae: Any, tiles: "torch.Tensor") -> None:
    """Give latents unit variance once scaled, and decoded pictures a visible contrast.

    An untrained encoder's output is nearly constant, and drowned by a posterior std of about 1;
    both would hide a picture's content from every test. ``tiles``: (B, 3, H, W) in [0, 1].
    """
    import torch

    pictures = torch.nn.functional.interpolate(tiles, scale_factor=16, mode="bilinear") * 2 - 1
    quant = vae.quant_conv
    quant.weight[4:] = 0  # the last four channels are the log-variance
    quant.bias[4:] = -8.0
    _rescale(quant, vae.encode(pictures).latent_dist.mean, std=1 / SCALING_FACTOR)
    latents = vae.encode(pictures).latent_dist.mean
    _rescale(vae.decoder.conv_out, vae.decode(latents).sample, std=0.5)


def _rescale(conv: "torch.nn.Conv2d", output: "torch.Tensor", std: float) -> None:
    """Fold into ``conv`` the map that gives its (B, C, H, W) output mean 0 and this std."""
    assert conv.bias is not None
    num_channels = output.shape[1]
    deviation, mean = output.std(dim=(0, 2, 3)), output.mean(dim=(0, 2, 3))
    factor = std / deviation
    conv.weight[:num_channels] *= factor[:, None, None, None]
    conv.bias[:num_channels] = (conv.bias[:num_channels] - mean) * factor


def _scheduler(diffusers: Any) -> Any:
    """SDXL's own settings."""
    return diffusers.EulerDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=1,
    )


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def main(folder: Path, seed: int) -> None:
    """Write a small random-weight SDXL into FOLDER."""
    make_random_base(folder, seed)


if __name__ == "__main__":
    main()
