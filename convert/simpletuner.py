"""Converts configs of SimpleTuner: what the options mean there, in our recipes."""

import re
from math import sqrt
from pathlib import Path
from typing import Any

from convert.onetrainer_concepts import read_json, read_json_table
from convert.prompts import MAX_PROMPTS, check_prompt, fit_prompt
from convert.recipes import (
    MAX_RECIPES,
    NUM_CROPS,
    Conversion,
    Recipe,
    cache_use,
    copy_rows,
    count_images,
    every,
    located,
    write_resolution,
    write_trackers,
)
from convert.tables import Given, Options, Report, read_table, shown

DEFAULT_BASE = "stabilityai/stable-diffusion-xl-base-1.0"
_SCHEDULES = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "linear": "linear",
    "cosine": "cosine",
    "polynomial": "linear",
    "sine": "cosine",
    "cosine_with_restarts": "cosine",
}
_EXACT_SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")
_CACHES = ("text_embeds", "image_embeds", "conditioning_image_embeds")


def convert_simpletuner(config: Path, datasets: Path | None, out: Path) -> Conversion:
    """The recipes of a config.json and a multidatabackend.json of SimpleTuner's.

    Raises:
        ValueError: a file or a value that cannot be read, or no SDXL; names file and option.
        OSError: a file cannot be read.
    """
    values: dict[str, Any] = {}
    for name, value in read_json_table(config).items():
        key = name.removeprefix("--").replace("-", "_")
        if key in values:
            raise ValueError(f"{config}: {shown(key)} is given twice, with -- and without")
        values[key] = value
    report = Report(read_table("simpletuner"))
    options = Options(report, (report.level(config, "", values),))
    family = options.get("model_family", str, "").value
    if family != "sdxl":
        raise options.fail(
            "model_family", f"{shown(family)} is not sdxl, which alone can be trained"
        )
    kind = options.get("model_type", str, "full")
    if kind.value not in ("lora", "full"):
        raise options.fail("model_type", f"must be lora or full, not {shown(kind.value)}")
    if datasets is None:
        given = options.get("data_backend_config", str)
        if not given.value:
            raise options.fail("data_backend_config", "is missing; name it here or as DATASETS")
        datasets = Path(located(given.value, config))
        report.write(given.labels, f"read: {datasets}")
    output = options.get("output_dir", str, "simpletuner-results")
    results = Path(output.value) / "shardtune"
    conversion = Conversion("SimpleTuner", config, out, report, results)
    report.write(output.labels, f"train: out = {shown(str(results))}")
    _write_train(conversion.train, options, kind)
    _write_backends(conversion, options, datasets)
    _write_prompts(conversion, options)
    return conversion


def _write_base(recipe: Recipe, options: Options) -> None:
    base = options.get("pretrained_model_name_or_path", str)
    path = located(base.value, options.levels[-1].path) if base.value else DEFAULT_BASE
    recipe.set("base", path, base, default="SDXL's base is SimpleTuner's default")
    vae = options.get("pretrained_vae_model_name_or_path", str)
    if vae.value and recipe.command != "train":
        recipe.set("vae", located(vae.value, options.levels[-1].path), vae)


# Training


def _write_train(train: Recipe, options: Options, kind: Given) -> None:
    _write_base(train, options)
    copy_rows(train, options)
    is_lora = kind.value == "lora"
    if is_lora:
        _write_lora(train, options)
        options.report.write(kind.labels, "train: a LoRA, as is the default")
    else:
        train.set("full", True, kind, default="model_type is full for SimpleTuner")
    batch = options.get("train_batch_size", int, 4)
    train.set("batch_size", batch.value, batch, default="train_batch_size is 4 for SimpleTuner")
    steps, epochs = options.get("max_train_steps", int), options.get("num_train_epochs", int, 1)
    if steps.value and steps.value > 0:
        train.set("steps", steps.value, steps)
    else:
        train.set("epochs", epochs.value, epochs, default="num_train_epochs is 1 for SimpleTuner")
    _write_optimizer(train, options)
    _write_objective(train, options)
    _write_memory(train, options, is_lora)
    _write_intervals(train, options)


def _write_lora(train: Recipe, options: Options) -> None:
    start, kind = options.get("init_lora", str), options.get("lora_type", str, "standard")
    rank, alpha = options.get("lora_rank", int, 16), options.get("lora_alpha", float)
    if start.value:
        train.set("init_lora", located(start.value, options.levels[0].path), start)
        for given in (rank, alpha, kind):
            options.drop(given, "--init-lora brings its own")
        return
    train.set("rank", rank.value, rank, default="lora_rank is 16 for SimpleTuner")
    value = float(rank.value) if alpha.value is None else alpha.value
    train.set("alpha", value, alpha, default="lora_alpha is the rank for SimpleTuner")
    is_standard = kind.value == "standard"
    if not is_standard:
        options.drop(kind, "a plain LoRA is trained, of all linear layers")
    targets = "attention" if is_standard else "all"
    train.set("targets", targets, kind, default="a standard LoRA of SimpleTuner adapts attention")
    dora = options.get("use_dora", bool, False)
    if dora.value:
        train.set("adapter", "dora", dora)


def _write_optimizer(train: Recipe, options: Options) -> None:
    kind = options.get("optimizer", str, "adamw_bf16")
    name = kind.value.lower()
    if "prodigy" in name:
        optimizer = "prodigy"
    elif "adamw" in name and "8bit" in name:
        optimizer = "adamw8bit"
    else:
        optimizer = "adamw"
    if not re.fullmatch(r"((bnb|ao|optimi)-)?adamw(8bit)?(_bf16|-paged)?|prodigy", name):
        options.drop(kind, f"there is no {shown(kind.value)}; choose --lr anew")
    train.set("optimizer", optimizer, kind)
    rate = options.get("learning_rate", float, 4e-7)
    train.set("lr", rate.value, rate, default="learning_rate is 4e-7 for SimpleTuner")
    schedule = options.get("lr_scheduler", str, "constant_with_warmup")
    if schedule.value not in _EXACT_SCHEDULES:
        options.drop(schedule, f"there is no {shown(schedule.value)}")
    train.set("lr_schedule", _SCHEDULES.get(schedule.value, "constant"), schedule)
    warmup = options.get("lr_warmup_steps", int, 0)
    if warmup.value:
        train.set("warmup_steps", warmup.value, warmup)
    method = options.get("grad_clip_method", str, "value")
    norm = options.get("max_grad_norm", float, 2.0)
    given = Given(None, (*norm.labels, *method.labels))
    train.set("max_grad_norm", norm.value, given, default="max_grad_norm is 2 for SimpleTuner")
    if method.value != "norm":
        options.drop(given, "values are not clipped, but the norm of all, at the same number")


def _write_objective(train: Recipe, options: Options) -> None:
    dropout = options.get("caption_dropout_probability", float, 0.1)
    if dropout.value:
        default = "caption_dropout_probability is 0.1 for SimpleTuner"
        train.set("caption_dropout", dropout.value, dropout, default=default)
    offset, strength = (
        options.get("offset_noise", bool, False),
        options.get("noise_offset", float, 0.1),
    )
    if offset.value:
        given = Given(None, (*offset.labels, *strength.labels))
        train.set("noise_offset", strength.value, given)
    kind = options.get("prediction_type", str)
    if kind.value in ("epsilon", "v_prediction"):
        train.set("prediction_type", kind.value, kind)
    elif kind.value is not None:
        raise options.fail("prediction_type", f"{shown(kind.value)} cannot be trained here")
    loss, delta = options.get("loss_type", str, "l2"), options.get("huber_c", float)
    if loss.value in ("huber", "smooth_l1"):
        train.set("loss", "huber", loss)
        if delta.value is not None:
            train.set("huber_delta", delta.value, delta)
    elif loss.value != "l2":
        raise options.fail("loss_type", f"must be l2, huber or smooth_l1, not {shown(loss.value)}")


def _write_memory(train: Recipe, options: Options, is_lora: bool) -> None:
    given = options.get("mixed_precision", str, "bf16")
    if given.value not in ("no", "fp16", "bf16", "fp32"):
        raise options.fail("mixed_precision", f"{shown(given.value)} is no precision to train in")
    precision = "fp32" if given.value == "no" else given.value
    train.set("precision", precision, given, default="mixed_precision is bf16 for SimpleTuner")
    quant = options.get("base_model_precision", str, "no_change")
    if quant.value not in ("no_change", "fp32", "bf16", "fp16"):
        if is_lora:
            small = re.search(r"int[24]|nf4|fp4|int3|uint[1-4]", quant.value)
            train.set("base_quant", "nf4" if small else "int8", quant)
        else:
            options.drop(quant, "of a LoRA's frozen base")
    checkpointing = options.get("gradient_checkpointing", bool)
    if checkpointing.value is not None:
        train.set("gradient_checkpointing", checkpointing.value, checkpointing)
    uses, decay = options.get("use_ema", bool, False), options.get("ema_decay", float, 0.995)
    device, only_cpu = (
        options.get("ema_device", str, "cpu"),
        options.get("ema_cpu_only", bool, False),
    )
    if uses.value:
        train.set("ema", decay.value, Given(None, (*uses.labels, *decay.labels)))
        if device.value == "cpu":
            given = Given(None, (*device.labels, *only_cpu.labels))
            train.set("ema_on_cpu", True, given, default="ema_device is cpu for SimpleTuner")


def _write_intervals(train: Recipe, options: Options) -> None:
    legacy = options.get("checkpointing_steps", int)
    by = ("checkpoint_epoch_interval", "checkpoint_step_interval")
    interval, given = every(options, *by)
    if not interval and legacy.value:
        interval, given = str(legacy.value), legacy
    default = "checkpoint_step_interval is 500 for SimpleTuner"
    train.set("checkpoint_every", interval or "500", given, default=default)
    keep = options.get("checkpoints_total_limit", int, 5)
    train.set("keep", keep.value, keep, default="checkpoints_total_limit is 5 for SimpleTuner")
    interval, given = every(options, "eval_epoch_interval", "eval_steps_interval")
    if interval:
        train.set("eval_every", interval, given)
    names = "report_to", "tracker_project_name", "tracker_run_name"
    write_trackers(train, options, *names)


# Datasets


def _write_backends(conversion: Conversion, options: Options, path: Path) -> None:
    backends = read_json(path)
    if not isinstance(backends, list) or not all(isinstance(part, dict) for part in backends):
        raise ValueError(f"{path}: must be a list of objects, one for each dataset")
    if len(backends) > MAX_RECIPES:
        raise ValueError(f"{path}: more than {MAX_RECIPES} datasets")
    uses, (top,) = [], options.levels
    for number, backend in enumerate(backends, 1):
        level = options.report.level(path, f"[{number}].", backend, "backend.")
        inner = Options(options.report, (level, top))
        kind = inner.get("dataset_type", str, "image").value
        is_off = [inner.get(name, bool, False).value for name in ("disabled", "disable")]
        if kind in _CACHES or any(is_off):
            continue
        if kind not in ("image", "eval"):
            conversion.notes.append(
                f"[{number}] is left out: datasets of {shown(kind)} are not read"
            )
            continue
        cache = _write_backend(conversion, Options(options.report, (level,)), inner, options)
        if kind == "eval":
            conversion.train.options["val"] = cache
            continue
        repeats = Options(options.report, (level,)).get("repeats", int, 0)
        if not 0 <= repeats.value < 1e6:
            raise inner.fail("repeats", f"is out of range: {repeats.value}")
        use = cache_use(cache, repeats.value + 1)
        options.report.write(repeats.labels, f"train: caches has {use}")
        uses.append(use)
    if not uses:
        raise ValueError(f"{path}: names no dataset of images")
    conversion.train.options["caches"] = uses


def _write_backend(conversion: Conversion, own: Options, inner: Options, options: Options) -> str:
    """One encode; returns its cache. ``inner`` falls back to the config, ``own`` does not."""
    backend = own.get("type", str, "local").value
    if backend != "local":
        raise own.fail("type", f"{shown(backend)} cannot be read; download it into a folder")
    given = own.get("instance_data_dir", str)
    if not given.value:
        raise own.fail("instance_data_dir", "is missing")
    folder = located(given.value, own.levels[0].path)
    recipe = conversion.new_encode(folder)
    recipe.set("dataset", folder, given)
    _write_base(recipe, options)
    if not count_images(folder, deep=True):
        conversion.notes.append(f"{folder}: no images were found there now")
    _write_captions(recipe, own, inner)
    _write_images(recipe, own, inner)
    batch = options.get("vae_batch_size", int)
    if batch.value is not None:
        recipe.set("batch_size", batch.value, batch)
    return str(recipe.options["out"])


def _write_captions(recipe: Recipe, own: Options, inner: Options) -> None:
    strategy = inner.get("caption_strategy", str, "filename")
    prompt = inner.get("instance_prompt", str, "")
    only = inner.get("only_instance_prompt", bool, False)
    if strategy.value == "instanceprompt" or only.value:
        if not prompt.value or prompt.value in ("reject", "empty"):
            raise inner.fail("instance_prompt", f"must be a text, not {shown(prompt.value)}")
        given = Given(None, (*strategy.labels, *prompt.labels, *only.labels))
        recipe.set("missing_caption", prompt.value, given, "of images without a text beside them")
    elif strategy.value == "textfile":
        if not inner.get("disable_multiline_split", bool, False).value:
            recipe.set("caption_lines", True, strategy, "each line is a caption")
    else:
        text = "write a text beside each image; those without one are rejected"
        inner.drop(strategy, text)
        if not strategy.labels:
            inner.report.write((), text, "caption_strategy is filename for SimpleTuner")
    prepend = inner.get("prepend_instance_prompt", bool, False)
    if prepend.value and prompt.value:
        given = Given(None, (*prepend.labels, *prompt.labels))
        recipe.set("caption_prefix", prompt.value, given)
    shuffle = own.get("caption_shuffle", dict, {})
    table = Options(
        Report(()), (Report(()).level(own.levels[0].path, "caption_shuffle.", shuffle.value),)
    )
    if table.get("enable", bool, False).value:
        recipe.set("shuffle_tags", table.get("count", int, 1).value, shuffle)
        if keep := table.get("position_start", int, 0).value:
            recipe.set("keep_tokens", keep, shuffle)
        if table.get("split_on", str, "comma").value != "comma":
            own.drop(shuffle, "tags are separated by commas")


def _write_images(recipe: Recipe, own: Options, inner: Options) -> None:
    kind = inner.get("resolution_type", str, "pixel_area")
    size = inner.get("resolution", float, 1024.0)
    if kind.value not in ("pixel", "area", "pixel_area"):
        raise inner.fail("resolution_type", f"{shown(kind.value)} is not known")
    is_area = kind.value == "area"
    side = 1000 * sqrt(max(0.0, size.value)) if is_area else size.value
    if not 64 <= side <= 16384:
        raise inner.fail("resolution", f"is out of range: {shown(size.value)}")
    crop = own.get("crop", bool, False)
    aspect, style = own.get("crop_aspect", str, "square"), own.get("crop_style", str, "random")
    is_square = crop.value and aspect.value == "square"
    step = inner.get("aspect_bucket_alignment", int, 64)
    if step.value < 8 or step.value % 8:
        raise inner.fail("aspect_bucket_alignment", f"must be a multiple of 8, not {step.value}")
    given = Given(None, (*size.labels, *kind.labels))
    if not is_square:
        recipe.set("bucket_step", step.value, step)
    write_resolution(recipe, side**2, 8 if is_square else step.value, given, "")
    if is_square:
        recipe.set("square", True, Given(None, (*crop.labels, *aspect.labels)))
    elif crop.labels:
        labels = (*crop.labels, *aspect.labels)
        inner.report.write(labels, "encode: buckets, as is the default")
    if crop.value and style.value == "random" and not is_square:
        recipe.set("crops", NUM_CROPS, Given(None, (*style.labels, *crop.labels)))
    least = inner.get("minimum_image_size", float, 0.0)
    if least.value > 0:
        value = 1000 * sqrt(least.value) if is_area else least.value
        recipe.set("min_size", int(min(value, 1e6)), least)


# Prompts


def _write_prompts(conversion: Conversion, options: Options) -> None:
    texts: list[str] = []
    prompt = options.get("validation_prompt", str, "")
    if prompt.value.strip():
        texts.append(prompt.value)
    library = options.get("user_prompt_library", str)
    labels = prompt.labels
    if library.value:
        path = Path(located(library.value, options.levels[0].path))
        if path.is_file():
            table = read_json_table(path)
            texts += [text for text in table.values() if isinstance(text, str) and text.strip()]
            labels = (*labels, *library.labels)
        else:
            options.drop(library, "no such file here; give encode --preview-prompts FILE")
    if len(texts) > MAX_PROMPTS:
        raise options.fail("user_prompt_library", f"more than {MAX_PROMPTS:,} prompts")
    shape = options.get("validation_resolution", str)
    negative = options.get("validation_negative_prompt", str, "blurry, cropped, ugly")
    for text in texts:
        conversion.prompts.append(_prompt(text, negative.value, shape, options))
    if not conversion.prompts:
        return
    generate = conversion.generate
    conversion.add_generate(Given(None, labels))
    for given in (negative, shape):
        options.report.write(given.labels, "prompts.jsonl: of each prompt")
    _write_base(generate, options)
    guidance = options.get("validation_guidance", float, 7.5)
    generate.set("guidance_scale", guidance.value, guidance, default="validation_guidance is 7.5")
    for name, option, kind in (
        ("validation_guidance_rescale", "guidance_rescale", float),
        ("validation_num_inference_steps", "num_steps", int),
        ("validation_seed", "seed", int),
    ):
        value = options.get(name, kind)
        if value.value is not None:
            generate.set(option, value.value, value)
    by = ("validation_epoch_interval", "validation_step_interval")
    interval, given = every(options, *by)
    legacy = options.get("validation_steps", int)
    if not interval and legacy.value:
        interval, given = str(legacy.value), legacy
    default = "validation_step_interval is 100 for SimpleTuner"
    conversion.train.set("preview_every", interval or "100", given, default=default)


def _prompt(text: str, negative: str, shape: Given, options: Options) -> dict[str, Any]:
    prompt: dict[str, Any] = {"text": text, "negative": negative}
    if shape.value:
        first = shape.value.split(",")[0].strip().lower()
        match = re.fullmatch(r"([0-9]{1,5})(?:x([0-9]{1,5}))?", first)
        if match is None:
            raise options.fail(
                "validation_resolution", f"must be N or WxH, not {shown(shape.value)}"
            )
        prompt |= {"width": int(match[1]), "height": int(match[2] or match[1])}
    fit_prompt(prompt)
    try:
        check_prompt(prompt)
    except ValueError as error:
        raise options.fail("validation_prompt", str(error)) from None
    return prompt
