"""Builds SDXL's parts at any width, for the trained miniature and for the random base."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTokenizer

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 77  # tokens
Pair = tuple[str, str]


def write_tokenizer(folder: Path, merges: list[Pair], pad_token: str) -> CLIPTokenizer:
    """CLIP's byte-level BPE with these merges, written and returned. SDXL's first tokenizer pads
    with EOS, its second with "!", which is id 0."""
    vocab = vocabulary(merges)
    any_merges: Any = merges  # annotated list[str], yet pairs are what it takes
    tokenizer = CLIPTokenizer(
        vocab=vocab, merges=any_merges, pad_token=pad_token, model_max_length=MAX_LENGTH
    )
    tokenizer.save_pretrained(folder)
    # The two files that SDXL itself ships; transformers 5 saves a tokenizer.json alone.
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tokenizer


def vocabulary(merges: list[Pair]) -> dict[str, int]:
    """CLIP's order: 256 byte symbols ("!" is 0), those that end a word, merges, BOS, EOS."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    # Bytes without a printable character are written as U+0100 and up.
    symbols = [chr(code) for code in (*printable, *range(0x100, 0x200 - len(printable)))]
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols)]
    tokens += ["".join(pair) for pair in merges]
    return {token: number for number, token in enumerate([*tokens, BOS, EOS])}


def text_config(
    tokenizer: CLIPTokenizer, width: int, num_heads: int, projection: int, activation: str
) -> CLIPTextConfig:
    """The config of a text encoder of two layers; SDXL's first has ``quick_gelu``, its second
    ``gelu``."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=projection,
        num_hidden_layers=2,
        num_attention_heads=num_heads,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_act=activation,
        # The real ids: with the default eos_token_id of 2 CLIP pools by an old rule instead.
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@torch.no_grad()
def spread_embeddings(model: torch.nn.Module, position_std: float) -> None:
    """Random ones, wider than CLIP's own of std 0.02 and 0.01, which leave all prompts alike."""
    for name, std in (("token_embedding", 0.5), ("position_embedding", position_std)):
        for path, part in model.named_modules():
            if path.endswith(name) and isinstance(part, torch.nn.Embedding):
                part.weight.normal_(std=std)


def make_unet(
    channels: tuple[int, int, int],
    num_heads: tuple[int, int, int],
    text_widths: tuple[int, int],
    time_embed_dim: int,
) -> Any:
    """SDXL's three levels: no attention in the first, then transformers of one layer (SDXL: 2) and
    of two (SDXL: 10). ``time_embed_dim`` is that of each of the six size and crop numbers."""
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=channels,
        layers_per_block=1,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=num_heads,  # by diffusers' old misnomer
        norm_num_groups=8,
        cross_attention_dim=sum(text_widths),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=time_embed_dim,
        projection_class_embeddings_input_dim=text_widths[1] + 6 * time_embed_dim,
    )


def make_vae(channels: tuple[int, int, int, int], **config: Any) -> Any:
    """SDXL's four levels, each of one layer: 8 pixels a latent, of 4 channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        force_upcast=True,
        **config,
    )


def make_scheduler() -> Any:
    """SDXL's own settings."""
    return EulerDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=1,
    )
