"""Builds the miniature SDXL from nothing: less than an hour of one CPU core.

Each step leaves its result in the work folder and is skipped where it is there already; the two
trainings go on from their last checkpoint.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from runtime.files import replace_path

ROOT = Path(__file__).parents[2]
ASSET = ROOT / "assets" / "miniature-sdxl"
MAX_BYTES = 6_000_000
TRAINING = (
    "--full --steps 6000 --batch-size 32 --lr 1.5e-3 --lr-schedule cosine --warmup-steps 100 "
    "--weight-decay 1e-3 --min-snr-gamma 5 --ema 0.998 --caption-dropout 0.1 --unconditional zeros "
    "--checkpoint-every 500 --keep 2 --log-every 50"
)
ENCODING = "--resolution 64 --batch-size 32 --empty-captions"
CACHES = {"any-size": "--bucket-step 16", "cropped": "--square"}


def build(work: Path, out: Path) -> None:
    """Everything, in order; ``out`` is replaced at the end."""
    import torch

    torch.set_num_threads(1)
    from tools.miniature.card import write_card

    base = work / "base"
    _step("draw the training images", lambda: draw_training_images(work / "images"))
    if not (base / "model_index.json").exists():
        _step("tokenizers, text encoders, VAE", lambda: make_base(base, work / "vae.safetensors"))
    for name, shape in CACHES.items():
        encode = f"encode {work}/images/{name} --base {base} --out {work}/{name} {ENCODING}"
        _step(f"encode {name}", partial(_cli, f"{encode} {shape}"))
    if not (work / "run" / "unet").exists():
        caches = " ".join(f"{work}/{name}" for name in CACHES)
        train = f"train {caches} --base {base} --out {work}/run --resume {TRAINING}"
        _step("train the UNet", lambda: _cli(train))
    _step("put it together", lambda: assemble(base, work / "run" / "unet", out))
    _step("score it", lambda: click.echo(str(write_card(out, work / "drawn", _cli))))
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    click.echo(f"{out}: {size:,} bytes")
    assert size <= MAX_BYTES, f"over {MAX_BYTES:,} bytes"


def draw_training_images(folder: Path) -> None:
    """``any-size`` and ``cropped``, each but where its list, which is written last, is there."""
    from tools.miniature.data import LIST, write_cropped_set, write_training_set

    for name, write in (("any-size", write_training_set), ("cropped", write_cropped_set)):
        if not (folder / name / LIST).exists():
            write(folder / name)


def _step(name: str, do: Callable[[], Any]) -> None:
    click.secho(f"== {name}", bold=True)
    start = time.perf_counter()
    do()
    click.echo(f"== {name}: {time.perf_counter() - start:.0f} s")


def _cli(arguments: str) -> None:
    """Run the product as a user would."""
    click.echo(f"$ python cli.py {arguments}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "cli.py"), *shlex.split(arguments)]
    if code := subprocess.run(command, env=environment).returncode:
        click.echo("It stopped there; the same command goes on from where it was.")
        raise SystemExit(code)


def make_base(folder: Path, checkpoint: Path) -> None:
    """Make a diffusers folder in fp16, whose UNet has random weights: it is trained next."""
    import torch
    from diffusers import StableDiffusionXLPipeline

    from tools.miniature.text import make_text_encoders
    from tools.miniature.tokenizer import make_tokenizers
    from tools.miniature.unet import make_unet
    from tools.miniature.vae import give_unit_variance, held_out_psnr, train_vae
    from tools.small_sdxl import make_scheduler

    unfinished = folder.with_name(folder.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    tokenizers = make_tokenizers(unfinished)
    encoders = make_text_encoders(*tokenizers)
    vae = train_vae(checkpoint)
    give_unit_variance(vae)
    click.echo(f"VAE: {held_out_psnr(vae):.2f} dB on held-out shapes")
    kind: Any = StableDiffusionXLPipeline
    pipeline = kind(
        vae=vae.half(),
        text_encoder=encoders[0].half(),
        text_encoder_2=encoders[1].half(),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=make_unet().to(torch.float32),
        scheduler=make_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipeline.save_pretrained(unfinished)
    replace_path(unfinished, folder)


def assemble(base: Path, unet: Path, out: Path) -> None:
    """Copy the base to ``out`` with the trained UNet's fp16 weights, named as diffusers expects."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(base, out, ignore=shutil.ignore_patterns("unet"))
    (out / "unet").mkdir()
    weights = "diffusion_pytorch_model.safetensors"
    shutil.copyfile(unet / "diffusion_pytorch_model.fp16.safetensors", out / "unet" / weights)
    shutil.copyfile(unet / "config.json", out / "unet" / "config.json")
    for path in out.glob("text_encoder*/config.json"):
        # transformers loads in the dtype named here, diffusers in fp32: they must be alike.
        config = json.loads(path.read_bytes()) | {"dtype": "float32"}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for path in out.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes files for us alone


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("miniature-build"))
@click.option("--out", type=click.Path(path_type=Path), default=ASSET)
def main(work: Path, out: Path) -> None:
    """Build the miniature SDXL, with what is on the way in WORK, and replace OUT by it."""
    build(work, out)


if __name__ == "__main__":
    main()
