"""The miniature's two text encoders: CLIP, random and frozen.

SDXL's prompt embedding is the last hidden state but one of both, side by side; its pooled embedding
is the second's projection. A random transformer gives every sentence its own embedding, as a hash
would; that is enough for a UNet to learn the words, if the embeddings differ by enough.
"""

from typing import Any

import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

WIDTH_1, WIDTH_2 = 48, 80  # hidden sizes; the prompt embedding is as wide as both
NUM_LAYERS = 2
TOKEN_STD, POSITION_STD = 0.5, 0.15  # CLIP's own 0.02 and 0.01 leave all sentences almost alike


def make_text_encoders(
    first: CLIPTokenizer, second: CLIPTokenizer, seed: int = 0
) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """CLIP-L's and OpenCLIP-bigG's stand-ins, for the two tokenizers; fp32."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        one = CLIPTextModel(_config(first, WIDTH_1, num_heads=4, hidden_act="quick_gelu"))
        two = CLIPTextModelWithProjection(_config(second, WIDTH_2, num_heads=5, hidden_act="gelu"))
        for model in (one, two):
            _spread_embeddings(model)
    return one, two


def _config(tokenizer: CLIPTokenizer, width: int, **settings: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=WIDTH_2,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=settings.pop("num_heads"),
        max_position_embeddings=tokenizer.model_max_length,
        # The real ids: with the default eos_token_id of 2 CLIP pools by an old rule instead.
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )


@torch.no_grad()
def _spread_embeddings(model: torch.nn.Module) -> None:
    for name, std in (("token_embedding", TOKEN_STD), ("position_embedding", POSITION_STD)):
        for path, part in model.named_modules():
            if path.endswith(name) and isinstance(part, torch.nn.Embedding):
                part.weight.normal_(std=std)
