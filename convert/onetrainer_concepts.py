"""Concepts of OneTrainer, and the encodes of them."""

from pathlib import Path
from typing import Any

from convert.recipes import (
    MAX_RECIPES,
    NUM_ORDERS,
    Conversion,
    Recipe,
    cache_use,
    count_images,
    located,
    write_resolution,
)
from convert.tables import Given, Options, shown
from runtime.safe_parsing import parse_json, read_bounded

MAX_BYTES = 4_000_000  # of a config


def read_json(path: Path) -> Any:
    """
    Raises:
        ValueError: not JSON, or too large; names the file.
        OSError: it cannot be read.
    """
    data = read_bounded(path, MAX_BYTES)
    try:
        return parse_json(data)
    except ValueError:
        raise ValueError(f"{path}: not valid JSON") from None


def read_json_table(path: Path) -> dict[str, Any]:
    """``read_json`` of an object; ValueError as there."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


def flat(values: dict[str, Any], parts: tuple[str, ...]) -> dict[str, Any]:
    """The options of the named tables as ``table.option``."""
    level: dict[str, Any] = {}
    for name, value in values.items():
        if name in parts and isinstance(value, dict):
            level |= {f"{name}.{key}": part for key, part in value.items()}
        else:
            level[name] = value
    return level


def write_base(recipe: Recipe, options: Options) -> None:
    base = options.get("base_model_name", str)
    if not base.value:
        raise options.fail("base_model_name", "is missing; name an SDXL base")
    recipe.set("base", located(base.value, options.levels[-1].path), base)
    vae = options.get("vae.model_name", str)
    if vae.value and recipe.command != "train":
        recipe.set("vae", located(vae.value, options.levels[-1].path), vae)


def write_concepts(conversion: Conversion, options: Options) -> int | None:
    """One encode each; returns the samples of an epoch, if they can be counted."""
    concepts, source = _concepts(options)
    uses, total = [], 0
    for number, concept in enumerate(concepts, 1):
        prefix = f"concepts[{number}]."
        level = options.report.level(source, prefix, flat(concept, ("image", "text")), "concepts.")
        inner = Options(options.report, (level,))
        kind = inner.get("type", str, "STANDARD")
        if not inner.get("enabled", bool, True).value:
            conversion.notes.append(f"concepts[{number}] is left out: it is not enabled")
            continue
        if kind.value == "PRIOR_PREDICTION":
            inner.drop(kind, "the concept is left out: the base's prediction is no target here")
            continue
        path = inner.get("path", str)
        if not path.value:
            raise inner.fail("path", "is missing")
        folder = located(path.value, source)
        recipe = conversion.new_encode(folder)
        recipe.set("dataset", folder, path)
        write_base(recipe, options)
        _write_texts(recipe, inner)
        _write_images(recipe, inner, options)
        num = count_images(folder, deep=True)
        if not num:
            conversion.notes.append(f"{folder}: no images were found there now")
        cache = recipe.options["out"]
        if kind.value == "VALIDATION":
            conversion.train.set("val", cache, kind)
            continue
        repeats = _repeats(inner, num)
        weight = inner.get("loss_weight", float, 1.0)
        use = cache_use(cache, repeats.value, weight.value)
        options.report.write((*repeats.labels, *weight.labels), f"train: caches has {use}")
        options.report.write(kind.labels, "train: caches has it")
        uses.append(use)
        total = -1 if num is None or total < 0 else total + num * repeats.value
    if not uses:
        raise ValueError(f"{source}: names no concept that is trained on")
    conversion.train.options["caches"] = uses
    return total if total > 0 else None


def _concepts(options: Options) -> tuple[list[dict[str, Any]], Path]:
    """The concepts, and the file that holds them."""
    source = options.levels[0].path
    listed = options.get("concepts", list)
    options.report.write(listed.labels, "read: each is listed by itself")
    value: Any = listed.value
    if value is None:
        given = options.get("concept_file_name", str, "training_concepts/concepts.json")
        source = Path(located(given.value, source))
        options.report.write(given.labels, f"read: {source}")
        if not source.is_file():
            raise options.fail("concept_file_name", f"{source} is not there; it names the images")
        value = read_json(source)
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        raise ValueError(f"{source}: the concepts must be a list of objects")
    if len(value) > MAX_RECIPES:
        raise ValueError(f"{source}: more than {MAX_RECIPES} concepts")
    return value, source


def _repeats(options: Options, num_images: int | None) -> Given:
    balancing = options.get("balancing", float, 1.0)
    strategy = options.get("balancing_strategy", str, "REPEATS")
    labels = (*balancing.labels, *strategy.labels)
    repeats = balancing.value
    if strategy.value == "SAMPLES":
        repeats = balancing.value / num_images if num_images else 1
    if not 0 <= repeats <= 1e6:
        raise options.fail("balancing", f"is out of range: {shown(balancing.value)}")
    rounded = max(1, round(repeats))
    if rounded != repeats:
        options.drop(Given(None, labels), f"whole repeats alone: {rounded}")
    return Given(rounded, labels)


def _write_texts(recipe: Recipe, options: Options) -> None:
    source = options.get("text.prompt_source", str, "sample")
    if source.value == "sample":
        default = "OneTrainer takes one line of a text at random"
        recipe.set("caption_lines", True, source, default=default)
    else:
        options.drop(source, "write a text beside each image; those without one are rejected")
    shuffle = options.get("text.enable_tag_shuffling", bool, False)
    keep = options.get("text.keep_tags_count", int, 1)
    if shuffle.value:
        recipe.set("shuffle_tags", NUM_ORDERS, shuffle, "orders that are cached")
        if keep.value:
            recipe.set(
                "keep_tokens", keep.value, keep, default="keep_tags_count is 1 for OneTrainer"
            )


def _write_images(recipe: Recipe, options: Options, top: Options) -> None:
    flip = options.get("image.enable_random_flip", bool, False)
    if flip.value:
        recipe.set("flip", True, flip)
    variations = options.get("image_variations", int, 1)
    if variations.value > 1 and options.get("image.enable_crop_jitter", bool, True).value:
        recipe.set("crops", variations.value, variations)
    given = top.get("resolution", str, "512")
    override = options.get("image.enable_resolution_override", bool, False)
    if override.value:
        other = options.get("image.resolution_override", str, "512")
        given = Given(other.value, (*override.labels, *other.labels))
    sides = given.value.split(",")
    parts = sides[0].strip().lower().split("x")
    if len(parts) > 2 or not all(
        part.isascii() and part.isdigit() and len(part) < 6 for part in parts
    ):
        raise top.fail("resolution", f"must be N or WxH, not {shown(given.value)}")
    bucketing = top.get("aspect_ratio_bucketing", bool, True)
    area = int(parts[0]) * int(parts[-1])
    step = 8 if not bucketing.value else 64
    write_resolution(recipe, area, step, given, "resolution is 512 for OneTrainer")
    if len(sides) > 1:
        options.drop(given, f"one resolution a cache: {sides[0].strip()[:9]}, the first")
    if not bucketing.value:
        recipe.set("square", True, bucketing)
