"""The miniature's two text encoders: CLIP, random and frozen.

SDXL's prompt embedding is the last hidden state but one of both, side by side; its pooled embedding
is the second's projection. A random transformer gives every sentence its own embedding, as a hash
would; that is enough for a UNet to learn the words, if the embeddings differ by enough.
"""

import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tools.small_sdxl import spread_embeddings, text_config

WIDTH_1, WIDTH_2 = 48, 80  # hidden sizes; the prompt embedding is as wide as both


def make_text_encoders(
    first: CLIPTokenizer, second: CLIPTokenizer, seed: int = 0
) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """CLIP-L's and OpenCLIP-bigG's stand-ins, for the two tokenizers; fp32."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        text_encoder = CLIPTextModel(text_config(first, WIDTH_1, 4, WIDTH_2, "quick_gelu"))
        text_encoder_2 = CLIPTextModelWithProjection(
            text_config(second, WIDTH_2, 5, WIDTH_2, "gelu")
        )
        for model in (text_encoder, text_encoder_2):
            spread_embeddings(model, position_std=0.15)
    return text_encoder, text_encoder_2
