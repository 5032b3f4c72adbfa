"""The body of ``tune``: from a folder of images to a LoRA and images drawn with it.

``tune`` has no way of its own to do anything: it counts the images, chooses settings, and runs
``encode``, ``train`` and ``generate`` as they could be typed. Each of them goes on where it was,
and so does ``tune``.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import click

from runtime.files import write_durable, writing
from runtime.options import option
from runtime.workers import check_gpus
from sdxl.base import BASE_HELP, TOKENIZERS_HELP

SDXL_CHANNELS = 320  # of the UNet's first level
VAL_SHARE = 0.05
LEAST_FOR_VAL = 100  # images: of fewer, each is worth more as something to learn from
NUM_PREVIEWS = 3
BATCH = 4  # samples a step and process
LORA, FULL = "--lora", "--unet"


@dataclass(frozen=True)
class Recipe:
    """Settings of ``train`` for a goal; ``lr`` is for SDXL's own size."""

    lr: float
    passes: int  # over the images, in a run of neither bound
    least_steps: int
    most_steps: int
    options: str

    def steps(self, num_images: int) -> int:
        steps = -(-num_images * self.passes // BATCH)
        return min(self.most_steps, max(self.least_steps, steps))


# A style is broad and needs all layers; a face must be exact, and little else may change.
RECIPES = {
    "style": Recipe(1e-4, 40, 800, 8000, "--rank 32 --alpha 32 --targets all"),
    "character": Recipe(1e-4, 100, 800, 3000, "--rank 16 --alpha 16 --targets attention"),
    "concept": Recipe(1e-4, 80, 600, 4000, "--rank 16 --alpha 16 --targets all"),
    "full": Recipe(1e-5, 20, 1000, 50_000, "--full --ema 0.999"),
}
COMMON = "--lr-schedule cosine --min-snr-gamma 5 --caption-dropout 0.05 --keep 2"


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """Settings of one tune."""

    PANELS: ClassVar[dict[str, str]] = {
        "Essentials": "base out goal caption dry_run",
        "More": "steps resolution fit tokenizers device gpus",
    }

    dataset: Path
    train_options: tuple[str, ...] = ()
    base: str = option(MISSING, BASE_HELP, metavar="BASE")
    out: Path = option(MISSING, "Folder for the cache, the run and the images.", metavar="PATH")
    goal: Literal["style", "character", "concept", "full"] = option(
        "style", "What is to be learned; full trains the whole UNet, the others a LoRA."
    )
    caption: str | None = option(
        None,
        "Caption of images that have none, for example 'photo of ohwx man'. Default: they are "
        "left out.",
        metavar="TEXT",
    )
    steps: int | None = option(
        None, "Length of the run in optimizer steps. Default: by the goal and the number of images."
    )
    resolution: int | None = option(None, "Resolution to train at. Default: that of the base.")
    fit: str = option(
        "auto",
        "Memory to fit into, for example 12GB, or auto for what the device has free; see train.",
        metavar="SIZE|auto",
    )
    tokenizers: Path | None = option(None, TOKENIZERS_HELP, metavar="FOLDER")
    device: str = option("auto", "Device: auto, cuda, cuda:N, mps or cpu.", metavar="DEVICE")
    gpus: str | None = option(
        None,
        "Number of processes to start, one per GPU of this machine, or auto for all.",
        metavar="N|auto",
    )
    dry_run: bool = option(False, "Print the three commands, then exit.")

    def __post_init__(self) -> None:
        check_gpus(self.gpus)
        if self.train_options and not self.train_options[0].startswith("-"):
            raise ValueError(
                f"tune takes one folder of images; {self.train_options[0]!r} is a second one "
                "(options for train stand after --)"
            )
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"--steps must be at least 1, not {self.steps}")
        out, dataset = (Path(os.path.realpath(path)) for path in (self.out, self.dataset))
        if out.is_relative_to(dataset):
            raise ValueError(
                f"--out {self.out} lies in the dataset, whose images would include those that are "
                "drawn; give a folder outside of it"
            )

    @property
    def previews(self) -> Path:
        return self.out / "previews.jsonl"


Run = Callable[[list[str]], None]  # a command of cli.py, as if typed


def tune(settings: TuneSettings, run: Run) -> None:
    """Print the three commands, and run one after the other unless it is a dry run.

    Raises:
        ValueError: the dataset or the base cannot be used.
    """
    captions, num_images, has_val = _read_dataset(settings)
    commands = list(plan_commands(settings, num_images, has_val))
    click.echo(f"{num_images:,} images to learn from; the commands that follow do all of it:")
    for arguments in commands:
        click.secho(f"$ python cli.py {shlex.join(arguments)}", fg="cyan")
    if settings.dry_run:
        return
    _write_previews(settings.previews, captions)
    for arguments in commands:
        click.secho(f"\n$ python cli.py {shlex.join(arguments[:2])} ...", fg="cyan", bold=True)
        run(arguments)
    click.echo(
        f"\nDone. {settings.out / 'run'} has the weights and report.html, {settings.out / 'images'}"
        f" what they draw, before and after. Other prompts: change {settings.previews} and type "
        "the last command again."
    )


def plan_commands(settings: TuneSettings, num_images: int, has_val: bool) -> Iterator[list[str]]:
    """The arguments of ``encode``, ``train`` and ``generate``. ``has_val`` says whether the dataset
    has images of its own to validate on."""
    from sdxl.base import open_base

    base = open_base(settings.base, tokenizers=settings.tokenizers)
    resolution = settings.resolution or 8 * int(base.unet.config.get("sample_size", 128))
    cache, run, images = (str(settings.out / name) for name in ("cache", "run", "images"))
    everywhere = ["--base", settings.base]
    if settings.device != "auto":
        everywhere += ["--device", settings.device]
    if settings.gpus is not None:
        everywhere += ["--gpus", settings.gpus]
    tokenizers = ["--tokenizers", str(settings.tokenizers)] if settings.tokenizers else []
    share = ["--val-share", str(VAL_SHARE)]
    yield [
        *("encode", str(settings.dataset), *everywhere, "--out", cache, *tokenizers),
        *("--resolution", str(resolution), "--bucket-step", str(_bucket_step(resolution))),
        *(share if not has_val and num_images >= LEAST_FOR_VAL else []),
        *(["--missing-caption", settings.caption] if settings.caption else []),
        *("--preview-prompts", str(settings.previews)),
    ]
    recipe = RECIPES[settings.goal]
    steps = settings.steps or recipe.steps(num_images)
    quarter, tenth = max(1, steps // 4), steps // 10
    channels = base.unet.config.get("block_out_channels", [SDXL_CHANNELS])[0]
    # The rate of a hidden layer is as the inverse of its width (Yang et al. 2022, table 8).
    lr = f"{recipe.lr * SDXL_CHANNELS / channels:.2g}"
    yield [
        *("train", cache, *everywhere, "--out", run),
        *("--steps", str(steps), "--batch-size", str(BATCH), "--fit", settings.fit, "--lr", lr),
        *recipe.options.split(),
        *COMMON.split(),
        *("--warmup-steps", str(min(100, tenth)), "--eval-every", str(quarter)),
        *("--preview-every", str(quarter), "--checkpoint-every", str(quarter)),
        *settings.train_options,
        *(["--resume"] if (settings.out / "run").is_dir() else []),
    ]
    yield [
        *("generate", *everywhere, *tokenizers),
        *("--unet" if settings.goal == "full" else "--lora", run),
        *("--prompts", str(settings.previews), "--compare", "--out", images),
    ]


def _bucket_step(resolution: int) -> int:
    """SDXL's 64 pixels at 1024, and as much of it at other resolutions."""
    step = max(8, resolution // 16 // 8 * 8)
    return step if resolution % step == 0 else 8


def _read_dataset(settings: TuneSettings) -> tuple[list[str], int, bool]:
    """Captions to draw (those that will be held out, where there are), the number of images to
    learn from, and whether the dataset says itself on which to validate."""
    from precompute.dataset.file_roles import TRAIN, VAL
    from precompute.dataset.sources import read_dataset, split_by_share
    from precompute.settings import EncodeSettings

    encode = EncodeSettings(
        dataset=settings.dataset,
        base=settings.base,
        out=settings.out / "cache",
        missing_caption=settings.caption or "reject",
    )
    with warnings.catch_warnings():  # encode will say them
        warnings.simplefilter("ignore")
        sources = read_dataset(encode)
    has_val = VAL in sources
    images = sources.get(TRAIN) or sources[""]
    num_images = sum(record.repeats for record in images.records)
    if not has_val and num_images >= LEAST_FOR_VAL:
        sources = split_by_share(images, VAL_SHARE)
    shown = sources.get(VAL, images).records
    captions = [record.captions[0] for record in sorted(shown, key=lambda record: record.key)]
    captions = [*dict.fromkeys(filter(None, captions))][:NUM_PREVIEWS]
    if not captions:
        raise ValueError(
            f"{settings.dataset}: no image has a caption; write one beside each (x.txt for x.jpg), "
            "or give --caption TEXT for all"
        )
    return captions, num_images, has_val


def _write_previews(path: Path, captions: list[str]) -> None:
    """Once: what the user makes of the file stays."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"prompt": caption}, ensure_ascii=False) for caption in captions]
        with writing(path):
            write_durable(path, "".join(f"{line}\n" for line in lines).encode())


def run_as_process(arguments: list[str]) -> None:
    """Run a command of cli.py, to its end; signals to this process go on to it.

    Raises:
        SystemExit: with its exit code, if that is not 0; its message stands above.
    """
    cli = Path(__file__).with_name("cli.py")
    # In a session of its own a Ctrl-C reaches it once, by us.
    child = subprocess.Popen(
        [sys.executable, str(cli), *arguments], start_new_session=os.name == "posix"
    )
    with _signals_to(child):
        code = child.wait()
    if code:
        raise SystemExit(code if code > 0 else 128 - code)


@contextmanager
def _signals_to(child: "subprocess.Popen[bytes]") -> Iterator[None]:
    def pass_on(number: int, _: Any) -> None:
        child.send_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, pass_on) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
