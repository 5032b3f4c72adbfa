"""Datasets of kohya's sd-scripts: subsets, folders named 10_name, and the encodes of them."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from convert.recipes import (
    MAX_LISTED,
    MAX_RECIPES,
    NUM_CROPS,
    NUM_ORDERS,
    Conversion,
    Recipe,
    cache_use,
    count_images,
    located,
    write_resolution,
)
from convert.tables import Given, Level, Options, shown
from runtime.safe_parsing import parse_toml, read_bounded

MAX_BYTES = 1_000_000  # of a config
_RENAMED = {"batch_size": "train_batch_size", "num_repeats": "dataset_repeats"}  # in the config


@dataclass
class Subset:
    """Images that become one cache."""

    folder: Given
    options: Options
    repeats: Given
    is_reg: Given
    class_tokens: Given
    num_images: int | None
    is_tree: bool = False  # of folders 10_name, which could not be listed
    has_list: bool = False  # of captions, in kohya's own form

    @property
    def num_samples(self) -> int | None:
        return None if self.num_images is None else self.num_images * int(self.repeats.value)


def read_toml(path: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: not TOML, not UTF-8, or too large; names the file.
        OSError: it cannot be read.
    """
    try:
        return parse_toml(read_bounded(path, MAX_BYTES).decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8; save the file as UTF-8") from None
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(str(path)) else f"{path}: {text}") from None


def read_subsets(
    options: Options, conversion: Conversion, datasets: Path | None
) -> Iterable[Subset]:
    if datasets is None:
        yield from _subsets_of_folders(options)
        return
    tables = read_toml(datasets)
    report = options.report
    (top,) = options.levels
    for name in set(tables) - {"general", "datasets"}:
        report.level(datasets, "", {name: tables[name]}, "dataset config: ")
    general = report.level(datasets, "general.", _table(datasets, "general", tables.get("general")))
    for number, dataset in enumerate(_tables(datasets, "datasets", tables.get("datasets")), 1):
        where = f"datasets[{number}]."
        level = report.level(datasets, where, {k: v for k, v in dataset.items() if k != "subsets"})
        parts = _tables(datasets, f"{where}subsets", dataset.get("subsets"))
        for place, subset in enumerate(parts, 1):
            near = report.level(datasets, f"{where}subsets[{place}].", subset)
            inner = Options(report, (near, level, general, top), _RENAMED)
            yield from _subset(inner, near, conversion)


def _table(path: Path, name: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {name}: must be a table, not {shown(value)}")
    return value


def _tables(path: Path, name: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{path}: {name}: must be a list of tables, [[{name.rpartition('.')[2]}]]")
    if len(value) > MAX_RECIPES:
        raise ValueError(f"{path}: {name}: more than {MAX_RECIPES}")
    return [_table(path, name, part) for part in value]


def _subset(options: Options, level: Level, conversion: Conversion) -> Iterable[Subset]:
    folder = options.get("image_dir", str)
    if not folder.value:
        raise options.fail("image_dir", "is missing")
    repeats = options.get("num_repeats", int, 1)
    if repeats.value < 1:
        conversion.notes.append(f"{level.prefix[:-1]} is left out: it is taken 0 times, as there")
        return
    path = located(folder.value, options.levels[-1].path)
    yield Subset(
        Given(path, folder.labels),
        options,
        repeats,
        options.get("is_reg", bool, False),
        options.get("class_tokens", str),
        count_images(path),
        has_list=options.get("metadata_file", str).value is not None,
    )


def _subsets_of_folders(options: Options) -> Iterable[Subset]:
    """Folders 10_name in train_data_dir and reg_data_dir."""
    options = Options(options.report, options.levels, _RENAMED)
    for name, is_reg in (("train_data_dir", False), ("reg_data_dir", True)):
        given = options.get(name, str)
        if not given.value:
            continue
        root = located(given.value, options.levels[0].path)
        has_list = not is_reg and options.get("in_json", str).value is not None
        folders = None if has_list else _folders_with_repeats(root)
        if folders is None:
            repeats = options.get("num_repeats", int, 1) if has_list else Given(1)
            yield Subset(
                Given(root, given.labels),
                options,
                repeats,
                Given(is_reg),
                Given(None),
                count_images(root) if has_list else None,
                is_tree=not has_list,
                has_list=has_list,
            )
        elif not folders:
            raise options.fail(name, f"{shown(root)} has no folder named as 10_name")
        for folder, number, tokens in folders or ():
            path = os.path.join(root, folder)
            yield Subset(
                Given(path, given.labels),
                options,
                Given(number, given.labels),
                Given(is_reg),
                Given(tokens, given.labels),
                count_images(path),
            )


def _folders_with_repeats(root: str) -> list[tuple[str, int, str]] | None:
    """Name, repeats and class of each folder 10_name; None where ``root`` is not there, or is of
    images itself."""
    try:
        with os.scandir(root) as listed:
            entries = sorted(entry.name for entry in islice(listed, MAX_LISTED) if entry.is_dir())
    except (OSError, ValueError):
        return None
    folders = []
    for name in entries:
        match = re.fullmatch(r"([0-9]{1,6})(?:_(.*))?", name)
        if match and int(match[1]) > 0:
            folders.append((name, int(match[1]), match[2] or ""))
    return folders


def write_encodes(conversion: Conversion, options: Options, subsets: list[Subset]) -> None:
    num_train = [subset.num_samples for subset in subsets if not subset.is_reg.value]
    num_reg = [subset.num_samples for subset in subsets if subset.is_reg.value]
    uses: list[tuple[str, Subset]] = []
    for subset in subsets:
        recipe = conversion.new_encode(subset.folder.value)
        recipe.set("dataset", subset.folder.value, subset.folder)
        write_base(recipe, options)
        _write_captions(recipe, subset)
        _write_images(recipe, subset)
        chunks = options.get("max_token_length", int)
        if chunks.value is not None:
            if chunks.value not in (75, 150, 225):
                raise options.fail("max_token_length", f"must be 150 or 225, not {chunks.value}")
            recipe.set("long_captions", chunks.value // 75, chunks)
        recipe.set("batch_size", *_pair(options.get("vae_batch_size", int)))
        if subset.is_tree:
            recipe.set(
                "repeat_folders", True, subset.folder, "the folder is not there to be listed"
            )
            conversion.notes.append(
                f"{subset.folder.value} was not found: its folders' names become repeats, but no "
                "captions; give --missing-caption for images without one"
            )
        elif subset.num_images == 0 or subset.num_images is None:
            conversion.notes.append(f"{subset.folder.value}: no images were found there now")
        weight, repeats = Given(1.0), int(subset.repeats.value)
        if subset.is_reg.value:
            weight = options.get("prior_loss_weight", float, 1.0)
            repeats = _reg_repeats(repeats, num_train, num_reg)
        use = cache_use(recipe.options["out"], repeats, weight.value)
        labels = (*subset.repeats.labels, *subset.is_reg.labels, *weight.labels)
        conversion.report.write(labels, f"train: caches has {use}")
        uses.append((use, subset))
    uses.sort(key=lambda use: bool(use[1].is_reg.value))  # the eval is of the first
    conversion.train.options["caches"] = [use for use, _ in uses]


def _reg_repeats(repeats: int, num_train: list[int | None], num_reg: list[int | None]) -> int:
    """kohya takes regularization images again until they are as many as the others."""
    if None in num_train or None in num_reg:
        return repeats
    train, reg = sum(num for num in num_train if num), sum(num for num in num_reg if num)
    return max(1, round(repeats * train / reg)) if reg else repeats


def _pair(given: Given) -> tuple[Any, Given]:
    return given.value, given


def write_base(recipe: Recipe, options: Options) -> None:
    base = options.get("pretrained_model_name_or_path", str)
    recipe.set("base", located(base.value, options.levels[-1].path), base)
    vae = options.get("vae", str)
    if vae.value and recipe.command != "train":
        recipe.set("vae", located(vae.value, options.levels[-1].path), vae)


def _write_captions(recipe: Recipe, subset: Subset) -> None:
    options = subset.options
    if not subset.has_list:
        text = subset.class_tokens.value
        if text in ("reject", "empty"):
            raise options.fail("class_tokens", f"{text!r} is a keyword of ours; take another text")
        missing = "kohya trains images without a caption on an empty one"
        if not subset.is_tree:
            recipe.set("missing_caption", text or "empty", subset.class_tokens, default=missing)
    extension = options.get("caption_extension", str)
    if extension.value is not None and extension.value.lower() not in (".txt", ".caption"):
        options.drop(extension, "rename the files to .txt; other endings are not read")
    separator = options.get("caption_separator", str)
    if separator.value is not None and separator.value.strip() != ",":
        options.drop(separator, "tags are separated by commas alone")
    if options.get("enable_wildcard", bool, False).value:
        recipe.set("caption_lines", True, options.get("enable_wildcard", bool))
    prefix = options.get("caption_prefix", str)
    if prefix.value:
        recipe.set("caption_prefix", prefix.value, prefix)
    shuffle, keep = options.get("shuffle_caption", bool, False), options.get("keep_tokens", int, 0)
    if shuffle.value:
        recipe.set("shuffle_tags", NUM_ORDERS, shuffle, "orders that are cached")
        num_kept = max(0, keep.value - (prefix.value or "").count(","))
        if num_kept:
            recipe.set("keep_tokens", num_kept, keep)
    elif keep.value:
        options.drop(keep, "nothing is shuffled, so all tags stay in place")


def _write_images(recipe: Recipe, subset: Subset) -> None:
    options = subset.options
    for name in ("flip_aug", "random_crop", "alpha_mask"):
        given = options.get(name, bool, False)
        if given.value:
            target, value = {
                "flip_aug": ("flip", True),
                "random_crop": ("crops", NUM_CROPS),
                "alpha_mask": ("mask_from_alpha", True),
            }[name]
            recipe.set(target, value, given)
    given, width, height = _resolution(options)
    buckets = options.get("enable_bucket", bool, False)
    step = options.get("bucket_reso_steps", int, 64)
    if step.value < 8 or step.value % 8:
        raise options.fail("bucket_reso_steps", f"must be a multiple of 8, not {step.value}")
    is_square = not buckets.value and width == height
    if not is_square:
        recipe.set("bucket_step", step.value, step)
    absent = "" if given.labels else "kohya has no default; this is SDXL's"
    write_resolution(recipe, width * height, 8 if is_square else step.value, given, absent)
    if is_square:
        recipe.set("square", True, buckets, default="kohya's default: no buckets (enable_bucket)")
    elif buckets.labels:
        text = "" if buckets.value else ", though it is off: the resolution is no square"
        recipe.report.write(buckets.labels, f"encode: buckets, as is the default{text}")
    share = options.get("validation_split", float, 0.0)
    if share.value and not subset.is_reg.value:
        recipe.set("val_share", share.value, share)


def _resolution(options: Options) -> tuple[Given, int, int]:
    """Width and height, which may stand as N, "N", "W,H" or [W, H]."""
    for level in options.levels:
        value = level.values.get("resolution")
        if value is None:
            continue
        label = level.label("resolution")
        parts = value if isinstance(value, list) else [value]
        if isinstance(value, str):
            parts = value.split(",")
        parts = [part if isinstance(part, str | int) else "" for part in parts[:3]]
        sides = [
            int(part) if re.fullmatch(r" ?[0-9]{2,5} ?", str(part)[:9]) else 0 for part in parts
        ]
        if len(sides) not in (1, 2) or not all(64 <= side <= 16384 for side in sides):
            raise ValueError(
                f"{level.path}: {label}: must be N or W,H in pixels, not {shown(value)}"
            )
        return Given(value, (label,)), sides[0], sides[-1]
    return Given(None), 1024, 1024
