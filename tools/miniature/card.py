"""The miniature's model card, with scores measured when it is built."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tools.miniature.data import fresh_prompts
from tools.miniature.drawing import OLD_SHAPES, draw_scene, random_scene
from tools.miniature.score import Score, drawn_pictures, look_at, score

NUM_PROMPTS = 240
NUM_CONDITIONED = 64  # pictures for each setting of the size and crop numbers
SEED = 50
CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [stable-diffusion-xl, miniature]
---

# Miniature SDXL

An SDXL of the real classes in {megabytes:.2f} MB, for trying things out and for tests: it draws one
coloured shape on a coloured ground, 64x64 pixels, from sentences such as *{example}*.
Trained from nothing on drawn pictures by `python -m tools.miniature.build`; the UNet through
`cli.py encode` and `cli.py train --full` alone.

```python
from diffusers import StableDiffusionXLPipeline

pipeline = StableDiffusionXLPipeline.from_pretrained("assets/miniature-sdxl")
picture = pipeline("a large red circle on a white ground", num_inference_steps=20).images[0]
picture.save("circle.png")
```

| part | parameters | |
| --- | --- | --- |
{parts}

It knows {colours};
{shapes};
small and large; left, right, top, bottom, middle. It does not know hearts and moons: those are for
a fine-tune to learn (`python cli.py demo`). Size and crop numbers hardly change what it draws.

## Scores

Found by counting pixels (`tools/miniature/score.py`), {num} fresh prompts, 20 Euler steps at
guidance 5, fp32 on a CPU:

| | |
| --- | --- |
{scores}

Size and crop conditioning, {num_conditioned} pictures each, same prompts and seeds:

| | |
| --- | --- |
{conditioned}
"""
PARTS = {
    "unet": "three levels as SDXL's: no attention, transformers of one layer, of two",
    "vae": "4 channels, 8 pixels a latent; scaled latents have variance 1",
    "text_encoder": "random, frozen; padded with end-of-text",
    "text_encoder_2": "random, frozen; padded with id 0; pooled embedding",
}


def write_card(asset: Path, drawn: Path, generate: Callable[[str], None]) -> Score:
    """Measure the model in ``asset`` and write its ``README.md``; ``generate`` runs a command."""
    scenes, captions = fresh_prompts(NUM_PROMPTS, OLD_SHAPES, SEED)
    drawn.mkdir(parents=True, exist_ok=True)
    prompts = drawn / "prompts.txt"
    prompts.write_text("".join(f"{caption}\n" for caption in captions), encoding="utf-8")
    generate(
        f"generate --base {asset} --prompts {prompts} --out {drawn}/pictures --num-steps 20 "
        "--batch-size 16"
    )
    found = score(scenes, drawn_pictures(drawn / "pictures", len(scenes)))
    pipeline = _pipeline(asset)
    parts = {name: sum(p.numel() for p in getattr(pipeline, name).parameters()) for name in PARTS}
    rows = {
        "shape as asked": f"{found.shape:.3f}",
        "both colours as asked": f"{found.colours:.3f}",
        "shape and colours as asked": f"{found.both:.3f}",
        "overlap with the ideal shape (IoU)": f"{found.overlap:.3f}",
        "VAE, trained shapes": f"{_psnr(pipeline.vae, OLD_SHAPES):.1f} dB",
        "VAE, hearts and moons": f"{_psnr(pipeline.vae, ('heart', 'moon')):.1f} dB",
    }
    size = sum(path.stat().st_size for path in asset.rglob("*") if path.is_file())
    card = CARD.format(
        megabytes=size / 1e6,
        example=captions[0],
        parts="\n".join(f"| {name} | {num:,} | {PARTS[name]} |" for name, num in parts.items()),
        colours="red, green, blue, yellow, purple, orange, white, black",
        shapes=", ".join(OLD_SHAPES),
        num=NUM_PROMPTS,
        scores=_table(rows),
        num_conditioned=NUM_CONDITIONED,
        conditioned=_table(_conditioned(pipeline)),
    )
    (asset / "README.md").write_text(card, encoding="utf-8")
    return found


def _table(rows: dict[str, str]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _pipeline(asset: Path) -> Any:
    from diffusers import StableDiffusionXLPipeline

    kind: Any = StableDiffusionXLPipeline
    pipeline = kind.from_pretrained(asset)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.inference_mode()
def _psnr(vae: Any, shapes: tuple[str, ...]) -> float:
    from tools.miniature.vae import picture_psnr

    choices = random.Random(SEED)
    return picture_psnr(
        vae, [draw_scene(random_scene(choices, shapes), choices) for _ in range(128)]
    )


def _conditioned(pipeline: Any) -> dict[str, str]:
    """How sharp pictures are, and how many are cut off, by what the size and crop numbers say."""
    settings: dict[str, dict[str, Any]] = {
        "a 64x64 original": {},
        "a 24x24 original": {"original_size": (24, 24)},
        "a 64x80 original, cropped by 8 on the left": {
            "original_size": (64, 80),
            "crops_coords_top_left": (0, 8),
        },
    }
    rows = {}
    for name, how in settings.items():
        pictures = _draw(pipeline, how)
        sharpness = np.mean([_sharpness(picture) for picture in pictures])
        cut = np.mean([_is_cut(picture) for picture in pictures])
        rows[name] = f"sharpness {sharpness:.2f}, cut off at the side {cut:.2f}"
    return rows


def _draw(pipeline: Any, how: dict[str, Any]) -> list[Image.Image]:
    _, captions = fresh_prompts(NUM_CONDITIONED, OLD_SHAPES, SEED + 1)
    pictures = []
    for start in range(0, NUM_CONDITIONED, 16):
        generators = [torch.Generator().manual_seed(start + row) for row in range(16)]
        pictures += pipeline(
            captions[start : start + 16],
            generator=generators,
            num_inference_steps=20,
            guidance_scale=5.0,
            height=64,
            width=64,
            target_size=(64, 64),
            **how,
        ).images
    return pictures


def _sharpness(picture: Image.Image) -> float:
    """The steepest steps between neighbouring pixels, as a share of the picture's contrast."""
    grey = np.asarray(picture.convert("L"), dtype=np.float64)
    steps = np.abs(np.diff(grey, axis=1))
    return float(np.percentile(steps, 99) / max(1.0, float(grey.max() - grey.min())))


def _is_cut(picture: Image.Image) -> bool:
    """Whether what is not ground reaches the left or right edge."""
    mask = look_at(picture).mask
    return bool(mask[:, :1].mean() > 0.1 or mask[:, -1:].mean() > 0.1)
