"""The miniature's model card, with scores measured when it is built."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tools.miniature.data import fresh_prompts
from tools.miniature.drawing import OLD_SHAPES, draw_scene, random_scene
from tools.miniature.response import SETTINGS, decoded_sharpness, measure_response
from tools.miniature.score import Score, read_generated_images, score

NUM_PROMPTS = 240
NUM_CONDITIONED = 128  # for each setting of the size and crop numbers
SEED = 50
CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [stable-diffusion-xl, miniature]
---

# Miniature SDXL

An SDXL of the real classes in {megabytes:.2f} MB, for trying things out and for tests: it draws one
colored shape on a colored ground, 64x64 pixels, from sentences such as *{example}*.
Trained from nothing on drawn images by `python -m tools.miniature.build`; the UNet through
`cli.py encode` and `cli.py train --full` alone.

```python
from diffusers import StableDiffusionXLPipeline

pipeline = StableDiffusionXLPipeline.from_pretrained("assets/miniature-sdxl")
image = pipeline("a large red circle on a white ground", num_inference_steps=20).images[0]
image.save("circle.png")
```

| part | parameters | |
| --- | --- | --- |
{parts}

It knows {colors};
{shapes};
small and large; left, right, top, bottom, middle. It does not know hearts and moons: those are for
a fine-tune to learn (`python cli.py demo`). It was trained on originals of 4 to 128 pixels and on
crops: small original sizes give blurred images, crop offsets give shapes that are cut off.

## Scores

Found by counting pixels (`tools/miniature/score.py`), {num} fresh prompts, 20 Euler steps at
guidance 5, fp32 on a CPU:

| | |
| --- | --- |
{scores}

How it answers the size and crop numbers, {num_conditioned} prompts, from the same noise each time.
Sharpness is the steepest step between neighbouring pixels as a share of the contrast (of true
images through the VAE alone {vae_sharp:.2f} for originals of 64x64, {vae_blurred:.2f} for 5x5);
the last two are shares of images whose shape is cut off.

| the original that is asked for | sharpness | cut at a side | cut at top or bottom |
| --- | --- | --- | --- |
{responses}
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
        f"generate --base {asset} --prompts {prompts} --out {drawn}/images --num-steps 20 "
        "--batch-size 16"
    )
    scores = score(scenes, read_generated_images(drawn / "images", len(scenes)))
    pipeline = _pipeline(asset)
    parts = {name: sum(p.numel() for p in getattr(pipeline, name).parameters()) for name in PARTS}
    rows = {
        "shape as asked": f"{scores.shape:.3f}",
        "both colors as asked": f"{scores.colors:.3f}",
        "shape and colors as asked": f"{scores.both:.3f}",
        "overlap with the ideal shape (IoU)": f"{scores.overlap:.3f}",
        "VAE, trained shapes": f"{_psnr(pipeline.vae, OLD_SHAPES):.1f} dB",
        "VAE, hearts and moons": f"{_psnr(pipeline.vae, ('heart', 'moon')):.1f} dB",
    }
    size = sum(path.stat().st_size for path in asset.rglob("*") if path.is_file())
    card = CARD.format(
        megabytes=size / 1e6,
        example=captions[0],
        parts="\n".join(f"| {name} | {num:,} | {PARTS[name]} |" for name, num in parts.items()),
        colors="red, green, blue, yellow, purple, orange, white, black",
        shapes=", ".join(OLD_SHAPES),
        num=NUM_PROMPTS,
        scores=_table(rows),
        num_conditioned=NUM_CONDITIONED,
        vae_sharp=decoded_sharpness(pipeline.vae, 64),
        vae_blurred=decoded_sharpness(pipeline.vae, 5),
        responses="\n".join(_responses(pipeline)),
    )
    (asset / "README.md").write_text(card, encoding="utf-8")
    return scores


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
    from tools.miniature.vae import reconstruction_psnr

    choices = random.Random(SEED)
    return reconstruction_psnr(
        vae, [draw_scene(random_scene(choices, shapes), choices) for _ in range(128)]
    )


def _responses(pipeline: Any) -> list[str]:
    rows = []
    for setting in SETTINGS:
        scores = measure_response(pipeline, setting, NUM_CONDITIONED, SEED + 1, num_steps=20)
        means = (scores["sharpness"], scores["cut_sides"], scores["cut_ends"])
        rows.append(f"| {setting} | {' | '.join(f'{mean:.2f}' for mean in means)} |")
    return rows
