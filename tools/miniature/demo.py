"""The demo: teach the miniature two shapes that it does not know, and look at what it draws.

Each step is a command of ``cli.py`` that can be typed by hand; they run in this one process, which
spares loading torch five times.
"""

import shlex
import time
from collections.abc import Callable
from pathlib import Path

import click

from tools.miniature.compare import before_and_after
from tools.miniature.data import fresh_prompts, write_prior_set, write_sample_set
from tools.miniature.drawing import NEW_SHAPES, OLD_SHAPES, Scene
from tools.miniature.score import read_generated_images, score

NUM_PROMPTS = 32  # of each kind, for the score
NUM_SHOWN = 5  # of each kind, in the image at the end
ENCODING = "--resolution 64 --bucket-step 16 --batch-size 16"
TRAINING = (
    "--steps 500 --batch-size 16 --rank 16 --targets all --lr 1.5e-3 --lr-schedule cosine "
    "--warmup-steps 20 --ema 0.98 --min-snr-gamma 5 --caption-dropout 0.05"
)
DRAWING = "--num-steps 15 --batch-size 16"
Run = Callable[[list[str]], object]  # cli.py's commands, as if typed
Scenes = dict[str, list[Scene]]


def run_demo(out: Path, run: Run) -> Path:
    """Data, encode, train, generate, score; returns the image of before and after."""
    start = time.perf_counter()

    def do(text: str, command: str) -> None:
        click.secho(f"\n{text}", bold=True)
        click.secho(f"$ python cli.py {command}", fg="cyan")
        run(shlex.split(command))

    folder = shlex.quote(str(out))
    _write_data(out)
    scenes = _write_prompts(out)
    do(
        "What the miniature makes of hearts and moons before it has seen any; circles and other "
        "old shapes it knows.",
        f"generate --base miniature --prompts {folder}/prompts.txt --out {folder}/before {DRAWING}",
    )
    for name, description in (
        ("new", "the new shapes"),
        ("old", "some old ones, to be remembered"),
    ):
        do(
            f"Encode {description}, once: VAE latents and text embeddings, into tar shards.",
            f"encode {folder}/{name} --base miniature --out {folder}/cache-{name} {ENCODING}",
        )
    do(
        "Train a LoRA from both caches. From here on no VAE and no text encoder is loaded.",
        f"train {folder}/cache-new {folder}/cache-old --base miniature "
        f"--out {folder}/run --overwrite {TRAINING}",
    )
    do(
        "The same prompts and seeds again, with the LoRA.",
        f"generate --base miniature --lora {folder}/run --prompts {folder}/prompts.txt "
        f"--out {folder}/after {DRAWING}",
    )
    return _finish(out, scenes, time.perf_counter() - start)


def _write_data(out: Path) -> None:
    click.secho("Draw 120 captioned hearts and moons, and 120 images of old shapes.", bold=True)
    click.secho(f"$ python -m tools.miniature.data {shlex.quote(str(out))}", fg="cyan")
    write_sample_set(out / "new")
    write_prior_set(out / "old")


def _write_prompts(out: Path) -> Scenes:
    """``prompts.txt``: fresh prompts of the new shapes, then of the old; their scenes by kind."""
    scenes: Scenes = {}
    lines: list[str] = []
    for kind, shapes, size in (("new", NEW_SHAPES, "large"), ("old", OLD_SHAPES, None)):
        scenes[kind], captions = fresh_prompts(NUM_PROMPTS, shapes, seed=40, size=size)
        lines += captions
    (out / "prompts.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return scenes


def _finish(out: Path, scenes: Scenes, seconds: float) -> Path:
    """Score both folders, write the image, say where everything is."""
    everything = scenes["new"] + scenes["old"]
    parts = {"new": slice(0, NUM_PROMPTS), "old": slice(NUM_PROMPTS, 2 * NUM_PROMPTS)}
    lines = []
    for kind, part in parts.items():
        for when in ("before", "after"):
            scores = score(
                everything[part], read_generated_images(out / when, len(everything))[part]
            )
            lines.append(f"{kind} shapes {when:>6}: {scores}")
    shown = [*range(NUM_SHOWN), *range(NUM_PROMPTS, NUM_PROMPTS + NUM_SHOWN)]
    prompts = (out / "prompts.txt").read_text("utf-8").splitlines()
    image = out / "before-after.png"
    before_and_after(
        [prompts[n] for n in shown],
        [out / "before" / f"{n:06d}.png" for n in shown],
        [out / "after" / f"{n:06d}.png" for n in shown],
        footer="\n".join(lines),
    ).save(image)
    click.secho("\nShares of the images that show what their prompt says", bold=True)
    click.echo("\n".join(lines))
    click.echo(f"\nDone in {seconds:.0f} s. Look at {image}; the rest lies beside it:")
    click.echo("  new/ old/ (datasets), cache-new/ cache-old/, run/ (the LoRA), before/ after/")
    if (page := out / "run" / "report.html").exists():
        click.echo(f"  {page}: the run's curves, settings and checkpoints, to open in a browser")
    return image
