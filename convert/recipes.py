"""What a conversion writes: recipes in TOML, a prompt file, and a README with the commands."""

import json
import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

import click

from convert.tables import CLASSES, WRITTEN, Given, Options, Report
from runtime.files import check_own_folder, replacement, write_mark
from runtime.messages import printable
from shards.buckets import bucket_sizes

MARK = "conversion.json"  # in a folder that a conversion wrote: the digests of its files
PROMPTS = "prompts.jsonl"
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl", ".gif", ".tif", ".tiff")
MAX_LISTED = 1_000_000  # names of a folder that are looked at
MAX_RECIPES = 1000  # datasets of one config
NUM_ORDERS = 8  # cached orders of tags, where the source shuffles anew at each step
NUM_CROPS = 4  # cached crops, where the source crops anew at each step
CommandCheck = Callable[[list[str]], None]


@dataclass
class Recipe:
    """Options of one command, by name, as they are to be written."""

    command: str
    report: Report
    options: dict[str, Any] = field(default_factory=dict)

    def set(self, name: str, value: Any, given: Given, note: str = "", default: str = "") -> None:
        """Write an option that ``given`` asks for; where the source says nothing, it is written
        only if ``default`` says why."""
        if not given.labels and not default:
            return
        self.options[name] = value
        text = f"{self.command}: {toml_line(name, value)}"
        self.report.write(given.labels, f"{text} ({note})" if note else text, default)


@dataclass
class Conversion:
    """All that comes out of the config of another trainer."""

    tool: str
    source: Path
    out: Path  # the folder of the recipes
    report: Report
    results: Path  # where caches, the run and images will lie, as the beginning of their names
    encodes: list[tuple[str, Recipe]] = field(default_factory=list)  # by name
    prompts: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.train = Recipe("train", self.report)
        self.generate = Recipe("generate", self.report)
        self.train.options["out"] = str(self.results)

    @property
    def prompt_file(self) -> Path:
        return self.out / PROMPTS

    def new_encode(self, folder: str) -> Recipe:
        """The recipe of a further dataset.

        Raises:
            ValueError: there are too many.
        """
        if len(self.encodes) >= MAX_RECIPES:
            raise ValueError(f"{self.source}: more than {MAX_RECIPES} datasets")
        recipe = Recipe("encode", self.report)
        stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(folder).name)[:40].strip("-") or "dataset"
        name = f"{len(self.encodes) + 1:02}-{stem}"
        recipe.options |= {"dataset": folder, "out": f"{self.results}-cache-{name}"}
        self.encodes.append((name, recipe))
        return recipe

    def add_generate(self, given: Given, note: str = "") -> None:
        """The prompts into the first encode and a generate; ``given`` named them."""
        prompts, run = str(self.prompt_file), str(self.results)
        self.encodes[0][1].set("preview_prompts", prompts, given)
        self.generate.set("prompts", prompts, given, note)
        weights = {"unet": run} if self.train.options.get("full") else {"lora": [run]}
        self.generate.options |= {"out": f"{run}-images", **weights}

    def files(self) -> dict[str, Recipe]:
        """The recipes by the names of their files, in the order of their commands."""
        files = {f"encode-{name}.toml": recipe for name, recipe in self.encodes}
        files["train.toml"] = self.train
        if self.prompts:
            files["generate.toml"] = self.generate
        return files

    def commands(self) -> list[list[str]]:
        """The arguments of the commands to type, in order."""
        return [
            [recipe.command, "--config", str(self.out / name)]
            for name, recipe in self.files().items()
        ]


def copy_rows(recipe: Recipe, options: Options) -> None:
    """Write the options whose rows say that a value of theirs is copied as it is."""
    start = f"{recipe.command} --"
    for name, row in options.report.rows.items():
        if row.kind is not None and row.becomes.startswith(start):
            given = options.get(name, row.kind)
            if given.value is not None and given.value is not False:
                option = row.becomes.removeprefix(start).replace("-", "_")
                recipe.set(option, given.value, given)


def write_resolution(recipe: Recipe, area: float, step: int, given: Given, default: str) -> None:
    """Write the resolution of an area in pixels: a multiple of the bucket step, of at most it."""
    side = int(area**0.5 + 1e-6)
    rounded = max(step, side // step * step)
    note = f"its buckets are multiples of {step}" if rounded**2 != round(area) else ""
    recipe.set("resolution", rounded, given, note, default)


def count_images(folder: str, deep: bool = False) -> int | None:
    """Images in a folder, or None if it is not there; looks at MAX_LISTED names at most."""
    try:
        if not os.path.isdir(folder):
            return None
        if deep:
            names = [name for _, _, part in islice(os.walk(folder), MAX_LISTED) for name in part]
        else:
            with os.scandir(folder) as entries:
                names = [entry.name for entry in islice(entries, MAX_LISTED)]
        return sum(name.lower().endswith(IMAGE_ENDINGS) for name in names)
    except (OSError, ValueError):
        return None


def located(path: str, source: Path) -> str:
    """A path of a config: as it stands, or beside the config if it is there alone."""
    beside = source.parent / path
    try:
        if not os.path.isabs(path) and not os.path.exists(path) and os.path.exists(beside):
            return str(beside)
    except ValueError:
        pass
    return path


def steps_per_epoch(num_samples: int, batch_size: int, accumulate: int) -> int:
    return ceil(num_samples / (batch_size * accumulate))


def every(options: Options, epochs: str, steps: str) -> tuple[str, Given]:
    """An interval of ours, of epochs or else of steps; empty if there is none."""
    by_epochs, by_steps = options.get(epochs, int), options.get(steps, int)
    if by_epochs.value:
        if by_steps.value:
            options.drop(by_steps, f"one interval: {epochs} has the say")
        return f"{by_epochs.value}ep", by_epochs
    return (str(by_steps.value), by_steps) if by_steps.value else ("", Given(None))


def toml_value(value: Any) -> str:
    """A value in TOML; JSON's escapes of text are TOML's too."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value)
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def toml_line(name: str, value: Any) -> str:
    return f"{name.replace('_', '-')} = {toml_value(value)}"


def write_conversion(conversion: Conversion, check: CommandCheck) -> list[str]:
    """Write the folder, and return the lines of its README.

    ``check`` refuses a command of ours whose options are wrong, so that a recipe that would be
    refused when it is used is refused now.

    Raises:
        ValueError: OUT is no former conversion, or a recipe would be refused; nothing is changed.
    """
    out = conversion.out
    check_replaceable(out)
    lines = readme_lines(conversion)
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with replacement(out) as folder:
        folder.mkdir()
        for name, recipe in conversion.files().items():
            text = "".join(f"{toml_line(*item)}\n" for item in recipe.options.items())
            head = f"# {recipe.command} of a conversion from {conversion.tool}; README.txt says how"
            (folder / name).write_text(f"{head}\n{text}", encoding="utf-8")
        if conversion.prompts:
            rows = [json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in conversion.prompts]
            (folder / PROMPTS).write_text("".join(rows), encoding="utf-8")
        text = "".join(f"{line}\n" for line in lines)
        (folder / "README.txt").write_text(text, encoding="utf-8")
        _check_recipes(conversion, folder, check)
        write_mark(folder, MARK, tool=conversion.tool)
    return lines


def _check_recipes(conversion: Conversion, folder: Path, check: CommandCheck) -> None:
    for name, recipe in conversion.files().items():
        try:
            check([recipe.command, "--config", str(folder / name)])
            if recipe.command == "encode" and not recipe.options.get("square"):
                step = int(recipe.options.get("bucket_step", 64))
                bucket_sizes(int(recipe.options.get("resolution", 1024)), step)
        except (ValueError, click.ClickException) as error:
            reason = str(error).replace(str(folder / name), name).removeprefix(f"{name}: ")
            raise ValueError(
                f"{conversion.source}: its {recipe.command} cannot be converted: {reason}"
            ) from None


def check_replaceable(out: Path) -> None:
    """Refuse a folder that is something else than a former conversion as it was written.

    Raises:
        ValueError: names what is in the way.
    """
    check_own_folder(out, MARK, "convert")


def readme_lines(conversion: Conversion) -> list[str]:
    """The commands, what became of each option, and notes; as printed and as written."""
    lines = [f"Recipes converted from {conversion.tool}: {conversion.source}", ""]
    lines += ["Type these commands, in this order:", ""]
    lines += [f"  python cli.py {shlex.join(command)}" for command in conversion.commands()]
    caches = conversion.train.options["caches"]
    lines += ["", f"train takes these caches: {shlex.join(caches)}"]
    lines += [f"- {note}" for note in conversion.notes]
    outcomes = conversion.report.outcomes()
    for kind in CLASSES:
        entries = [outcome for outcome in outcomes if outcome.kind == kind]
        if entries:
            lines += ["", f"{kind} ({len(entries)}):"]
            lines += [
                f"  {outcome.label}: {outcome.text}".removesuffix(": ") for outcome in entries
            ]
    if conversion.report.defaults:
        lines += ["", WRITTEN.format(tool=conversion.tool) + ":"]
        lines += [f"  {text}" for text in conversion.report.defaults]
    return [printable(line).replace("\n", " ") for line in lines]


def cache_use(folder: str, repeats: int, weight: float = 1.0) -> str:
    """A cache as ``train`` takes it."""
    text = folder + ("" if weight == 1 else f",weight={weight!r}".removesuffix(".0"))
    return text + ("" if repeats == 1 else f",repeats={repeats}")


def same_in_all(values: Sequence[Given]) -> bool:
    return len({given.value for given in values}) <= 1


# Options that the trainers share.


def write_trackers(train: Recipe, options: Options, tracker: str, project: str, name: str) -> None:
    """TensorBoard and W&B; the names are those of the source's options."""
    used = options.get(tracker, str, "none")
    if used.value in ("tensorboard", "all"):
        train.set("tensorboard", True, used)
    if used.value in ("wandb", "all"):
        train.set("wandb", "online", used)
        for option, key in (("wandb_project", project), ("wandb_name", name)):
            if (given := options.get(key, str)).value:
                train.set(option, given.value, given)


ADAFACTOR_RATE = 1e-2  # relative to each weight: that of an Adafactor which paces itself
FULL_RATE = 1e-3  # relative to each weight, as in examples/full-24gb.toml


@dataclass(frozen=True)
class OptimizerChoice:
    """An optimizer of ours; a ``rate`` takes the place of the source's, for a ``reason``."""

    name: str
    note: str = ""
    rate: float | None = None
    reason: str = ""


def choose_adafactor(paces_itself: bool, is_relative: bool, is_lora: bool) -> OptimizerChoice:
    """What transformers' Adafactor becomes, by its relative_step and scale_parameter.

    Ours is torch's, whose rate is relative to each weight, and at most 1 / sqrt(step): at 1e-2
    that is what relative_step does there. An absolute rate it has not: AdamW's step at the same
    rate is the nearest, and a LoRA's state is small; for a whole UNet it would be too large.
    """
    if paces_itself:
        reason = "Adafactor paces itself: that is lr 0.01, relative to each weight"
        return OptimizerChoice("adafactor", rate=ADAFACTOR_RATE, reason=reason)
    if is_relative:
        return OptimizerChoice("adafactor")
    if is_lora:
        return OptimizerChoice("adamw", note="the nearest to Adafactor at an absolute rate")
    reason = "Adafactor's absolute rate becomes lr 0.001, relative to each weight"
    return OptimizerChoice("adafactor", rate=FULL_RATE, reason=reason)
