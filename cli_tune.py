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
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import click

from runtime.errors import echo, is_quiet
from runtime.files import write_durable, writing
from runtime.options import StageCommand, option
from runtime.workers import check_gpus
from sdxl.base import BASE_HELP, TOKENIZERS_HELP

if TYPE_CHECKING:
    from precompute.settings import EncodeSettings

SDXL_CHANNELS = 320  # of the UNet's first level
VAL_SHARE = 0.05
LEAST_FOR_VAL = 100  # images: of fewer, each is worth more as something to learn from
NUM_PREVIEWS = 3
BATCH = 4  # samples a step and process


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

    def check_inputs(self) -> None:
        """Refuse a dataset or a base that is something else, as ``encode`` does."""
        _encode_settings(self).check_inputs()

    @property
    def previews(self) -> Path:
        return self.out / "previews.jsonl"


Command = Callable[[list[str]], None]  # does something with a command of cli.py, as if typed


@dataclass(frozen=True)
class Dataset:
    """What ``tune`` wants to know of the images."""

    num_images: int  # to learn from
    num_samples: int  # in a pass over them: with their repeats
    has_val: bool  # images of its own to validate on
    is_split: bool  # whether tune holds some out
    captions: list[str]  # to draw: held-out ones where there are


def tune(settings: TuneSettings, run: Command, check: Command) -> None:
    """Print the three commands, and run one after the other unless it is a dry run.

    ``check`` refuses a command whose options are wrong: the last of them comes hours after the
    first, perhaps.

    Raises:
        ValueError: the dataset, the base or an option cannot be used.
    """
    dataset = _read_dataset(settings)
    commands = list(plan_commands(settings, dataset))
    for arguments in commands:
        try:
            check(arguments)
        except ValueError as error:
            if arguments[0] == "train" and "--resume" in arguments:
                error.add_note(_hint_to_resume(settings) + ".")
            raise
    num = dataset.num_images
    echo(f"{num:,} images to learn from; the commands that follow do all of it:")
    for arguments in commands:
        echo(f"$ python cli.py {shlex.join(arguments)}", fg="cyan")
    if settings.dry_run:
        return
    _write_previews(settings.previews, dataset.captions)
    for arguments in commands:
        echo(f"\n$ python cli.py {shlex.join(arguments[:2])} ...", fg="cyan", bold=True)
        try:
            run(arguments)
        except SystemExit as end:
            if arguments[0] == "train" and "--resume" in arguments and end.code == 2:
                echo(_hint_to_resume(settings), err=True)
            raise
    from sdxl.user_interfaces import describe_weights

    echo(
        f"\nDone. {settings.out / 'run'} has the weights and report.html, {settings.out / 'images'}"
        f" what they draw, before and after. Other prompts: change {settings.previews} and type "
        "the last command again."
    )
    for line in describe_weights(settings.out / "run", settings.base, settings.goal == "full"):
        echo(line)


def _hint_to_resume(settings: TuneSettings) -> str:
    return (
        f"tune goes on with the run in {settings.out / 'run'}. If its images have changed, delete "
        "that folder to train anew (the cache stays), or add -- --allow-changed-data and, to give "
        "it time for them, a larger --steps"
    )


def plan_commands(settings: TuneSettings, dataset: Dataset) -> Iterator[list[str]]:
    """The arguments of ``encode``, ``train`` and ``generate``."""
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
        *(share if dataset.is_split else []),
        *(["--missing-caption", settings.caption] if settings.caption else []),
        *("--preview-prompts", str(settings.previews)),
    ]
    recipe = RECIPES[settings.goal]
    steps = settings.steps or recipe.steps(dataset.num_samples)
    quarter, tenth = max(1, steps // 4), steps // 10
    channels = base.unet.config.get("block_out_channels", [SDXL_CHANNELS])[0]
    # The rate of a hidden layer is as the inverse of its width (Yang et al. 2022, table 8).
    lr = f"{recipe.lr * SDXL_CHANNELS / channels:.2g}"
    options = f"--steps {steps} --batch-size {BATCH} --lr {lr} {recipe.options} {COMMON}"
    options += f" --warmup-steps {min(100, tenth)} --preview-every {quarter}"
    options += f" --checkpoint-every {quarter}"
    if dataset.is_split or dataset.has_val:
        options += f" --eval-every {quarter}"
    if (settings.out / "run").is_dir():
        options += " --resume"
    yield [
        *("train", cache, *everywhere, "--out", run, "--fit", settings.fit),
        *_without_rivals(options.split(), settings.train_options),
        *settings.train_options,
    ]
    yield [
        *("generate", *everywhere, *tokenizers),
        *("--unet" if settings.goal == "full" else "--lora", run),
        *("--prompts", str(settings.previews), "--compare", "--out", images),
    ]


# Options of train that take the place of some that tune gives.
_RIVALS = {
    "--epochs": {"--steps"},
    "--init-lora": {"--rank", "--alpha", "--targets"},
    "--overwrite": {"--resume"},
}


def _without_rivals(options: list[str], given: Sequence[str]) -> Iterator[str]:
    """``options`` and their values, without those that exclude what the user has given."""
    rivals = set().union(*(_RIVALS.get(text.partition("=")[0], set()) for text in given))
    drops = False
    for text in options:
        if text.startswith("--"):
            drops = text in rivals
        if not drops:
            yield text


def _bucket_step(resolution: int) -> int:
    """SDXL's 64 pixels at 1024, and as much of it at other resolutions."""
    step = max(8, resolution // 16 // 8 * 8)
    return step if resolution % step == 0 else 8


def _read_dataset(settings: TuneSettings) -> Dataset:
    """Count the images.

    Raises:
        ValueError: the dataset cannot be used, or no image has a caption.
    """
    from precompute.dataset.file_roles import TRAIN, VAL
    from precompute.dataset.hub import locate_dataset
    from precompute.dataset.sources import read_dataset, split_by_share

    with warnings.catch_warnings():  # encode will say them
        warnings.simplefilter("ignore")
        sources = read_dataset(locate_dataset(_encode_settings(settings)).settings)
    has_val, is_split = VAL in sources, False
    images = sources.get(TRAIN) or sources[""]
    if not has_val and _wants_split(settings.out / "cache", len(images.records)):
        with suppress(ValueError):  # by chance no image would be held out
            sources = split_by_share(images, VAL_SHARE)
            is_split, images = True, sources[TRAIN]
    shown = sources.get(VAL, images).records
    captions = [record.captions[0] for record in sorted(shown, key=lambda record: record.key)]
    captions = [*dict.fromkeys(filter(None, captions))][:NUM_PREVIEWS]
    if not captions:
        raise ValueError(
            f"{settings.dataset}: no image has a caption; write one beside each (x.txt for x.jpg), "
            "or give --caption TEXT for all"
        )
    num_samples = sum(record.repeats for record in images.records)
    return Dataset(len(images.records), num_samples, has_val, is_split, captions)


def _wants_split(cache: Path, num_images: int) -> bool:
    """Whether some images are held out: as the cache has it, if there is one, however many images
    joined or left."""
    if (cache / "train").is_dir():
        return True
    return not cache.is_dir() and num_images >= LEAST_FOR_VAL


def _encode_settings(settings: TuneSettings) -> "EncodeSettings":
    from precompute.settings import EncodeSettings

    return EncodeSettings(
        dataset=settings.dataset,
        base=settings.base,
        out=settings.out / "cache",
        missing_caption=settings.caption or "reject",
    )


def _write_previews(path: Path, captions: list[str]) -> None:
    """Once: what the user makes of the file stays."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"prompt": caption}, ensure_ascii=False) for caption in captions]
        with writing(path):
            write_durable(path, "".join(f"{line}\n" for line in lines).encode())


def check_command(group: click.Group, arguments: list[str]) -> None:
    """Refuse a command of ``group`` whose options are wrong, as if it was typed, without running
    it."""
    name, *others = arguments
    command = group.commands[name]
    assert isinstance(command, StageCommand)
    with command.make_context(name, others) as ctx:
        names = {spec.name for spec in fields(command.settings)}
        values = {key: value for key, value in ctx.params.items() if key in names}
        command.make_settings(ctx, values, ctx.params.get("recipe"))


def run_as_process(arguments: list[str]) -> None:
    """Run a command of cli.py, to its end; what ends this process ends it too.

    Raises:
        SystemExit: with its exit code, if that is not 0; its message stands above.
    """
    cli = Path(__file__).with_name("cli.py")
    with _Relay() as relay:
        # In a session of its own a Ctrl-C reaches it once, by us.
        relay.child = subprocess.Popen(
            [sys.executable, str(cli), *arguments, *(["--quiet"] if is_quiet() else [])],
            start_new_session=os.name == "posix",
        )
        code = relay.wait()
    if code:
        raise SystemExit(code if code > 0 else 128 - code)


# What ends this process, and what the command is sent then. SIGTERM ends a run as it should be
# ended, with a checkpoint: also where the terminal was closed (SIGHUP).
_RELAYED = {name: "SIGTERM" for name in ("SIGTERM", "SIGHUP", "SIGQUIT")} | {"SIGINT": "SIGINT"}


class _Relay:
    """While entered, signals that would end this process go on to ``child``."""

    def __init__(self) -> None:
        self.child: subprocess.Popen[bytes] | None = None
        self._received: list[int] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Relay":
        for name, sent in _RELAYED.items():
            if (number := getattr(signal, name, None)) is not None:  # Windows has only two of them
                self._before[number] = signal.signal(number, self._pass_on(getattr(signal, sent)))
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait(self) -> int:
        """The child's exit code."""
        assert self.child is not None
        for number in self._received:  # while it was being started
            self.child.send_signal(number)
        return self.child.wait()

    def _pass_on(self, number: int) -> Callable[[int, Any], None]:
        def handle(*_: Any) -> None:
            if self.child is None:
                self._received.append(number)
            else:
                self.child.send_signal(number)

        return handle
