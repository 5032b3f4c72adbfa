"""Converts configs of OneTrainer: what the options mean there, in our recipes."""

import json
from pathlib import Path
from typing import Any

from convert.onetrainer_concepts import flat, read_json, read_json_table, write_base, write_concepts
from convert.prompts import MAX_PROMPTS, check_prompt, fit_prompt
from convert.recipes import (
    Conversion,
    OptimizerChoice,
    Recipe,
    choose_adafactor,
    copy_rows,
    located,
    steps_per_epoch,
)
from convert.tables import Given, Level, Options, Report, read_table, shown

SDXL = "STABLE_DIFFUSION_XL_10_BASE"
_PARTS = ("unet", "text_encoder", "text_encoder_2", "vae", "optimizer")
_DTYPES = {
    "FLOAT_16": "fp16",
    "BFLOAT_16": "bf16",
    "FLOAT_32": "fp32",
    "TFLOAT_32": "fp32",
}
_SCHEDULES = {
    "CONSTANT": "constant",
    "LINEAR": "linear",
    "COSINE": "cosine",
    "COSINE_WITH_HARD_RESTARTS": "cosine-restarts",
    "COSINE_WITH_RESTARTS": "cosine-restarts",
    "REX": "cosine",
}
_EXACT_SCHEDULES = ("CONSTANT", "LINEAR", "COSINE", "COSINE_WITH_HARD_RESTARTS")
_SAMPLERS = {"DDIM": "ddim", "EULER": "euler", "EULER_A": "euler-a", "DPMPP": "dpm++2m"}


def convert_onetrainer(config: Path, out: Path) -> Conversion:
    """The recipes of a config of OneTrainer's.

    Raises:
        ValueError: a file or a value that cannot be read, or no SDXL; names file and option.
        OSError: a file cannot be read.
    """
    values = read_json_table(config)
    report = Report(read_table("onetrainer"))
    top = report.level(config, "", flat(values, _PARTS))
    options = Options(report, (top,))
    kind = options.get("model_type", str, "STABLE_DIFFUSION_15").value
    if kind != SDXL:
        raise options.fail("model_type", f"{shown(kind)} is no SDXL; only {SDXL} can be trained")
    method = options.get("training_method", str, "FINE_TUNE")
    if method.value not in ("LORA", "FINE_TUNE"):
        raise options.fail("training_method", f"{shown(method.value)} cannot be trained here")
    for name in ("unet.train", "unet.include"):
        if not options.get(name, bool, True).value:
            raise options.fail(name, "must be true: the UNet is all that is trained")
    destination = options.get("output_model_destination", str, "models/model.safetensors")
    results = Path(destination.value)
    results = results.with_suffix("") if results.suffix in (".safetensors", ".ckpt") else results
    conversion = Conversion("OneTrainer", config, out, report, results)
    report.write(destination.labels, f"train: out = {shown(str(results))}")
    is_lora = method.value == "LORA"
    _write_train(conversion, options, method, is_lora)
    num_samples = write_concepts(conversion, options)
    _write_schedule(conversion.train, options, num_samples)
    _write_prompts(conversion, options)
    if options.get("text_encoder.train", bool, True).value:
        conversion.notes.append(
            "OneTrainer would train the text encoders too (text_encoder.train); here the UNet "
            "alone is trained"
        )
    return conversion


# Training


def _write_train(conversion: Conversion, options: Options, method: Given, is_lora: bool) -> None:
    train = conversion.train
    write_base(train, options)
    copy_rows(train, options)
    clip = "clip_grad_norm"
    if clip in options.levels[0].values and options.levels[0].values[clip] is None:
        train.set("max_grad_norm", 0.0, Given(0.0, (clip,)))
    if is_lora:
        _write_lora(train, options)
        options.report.write(method.labels, "train: a LoRA, as is the default")
    else:
        train.set("full", True, method, default="training_method is FINE_TUNE for OneTrainer")
    epochs = options.get("epochs", int, 100)
    train.set("epochs", epochs.value, epochs, default="epochs are 100 for OneTrainer")
    _write_optimizer(train, options, is_lora)
    _write_objective(train, options)
    _write_memory(train, options, is_lora)
    _write_intervals(train, options)


def _write_lora(train: Recipe, options: Options) -> None:
    kind = options.get("peft_type", str, "LORA")
    if kind.value != "LORA":
        options.drop(kind, f"instead of {shown(kind.value)} a LoRA is trained")
    rank, alpha = options.get("lora_rank", int, 16), options.get("lora_alpha", float, 1.0)
    preset = options.get("layer_filter_preset", str, "full")
    start = options.get("lora_model_name", str)
    if start.value:
        train.set("init_lora", located(start.value, options.levels[0].path), start)
        for given in (rank, alpha, preset):
            options.drop(given, "--init-lora brings its own")
        return
    train.set("rank", rank.value, rank, default="lora_rank is 16 for OneTrainer")
    train.set("alpha", alpha.value, alpha, default="lora_alpha is 1 for OneTrainer")
    default = "layer_filter_preset is full for OneTrainer"
    targets = {"attn-mlp": "all", "attn-only": "attention", "full": "all"}.get(preset.value)
    if targets is None:
        options.drop(preset, "--targets takes a REGEX over module names; all linear layers here")
    train.set("targets", targets or "all", preset, default=default)
    if preset.value == "full":
        train.set("conv", True, preset, default=default)
    dora = options.get("lora_decompose", bool, False)
    if dora.value:
        train.set("adapter", "dora", dora)


def _write_optimizer(train: Recipe, options: Options, is_lora: bool) -> None:
    kind = options.get("optimizer.optimizer", str, "ADAMW")
    name = kind.value.upper()
    names = {"ADAMW": "adamw", "ADAMW_8BIT": "adamw8bit", "PRODIGY": "prodigy"}
    choice = OptimizerChoice(names.get(name, "adamw"))
    rate, part = options.get("learning_rate", float, 3e-6), options.get("unet.learning_rate", float)
    if part.value is not None:
        options.drop(rate, "unet.learning_rate has the say, as there")
        rate = part
    value = rate.value * _rate_scale(train, options)
    if name == "ADAFACTOR":
        paces_itself = options.get("optimizer.relative_step", bool, False)
        is_relative = options.get("optimizer.scale_parameter", bool, False)
        choice = choose_adafactor(paces_itself.value, is_relative.value, is_lora)
        for given in (paces_itself, is_relative):
            options.report.write(given.labels, f"train: optimizer = {choice.name}")
    elif name not in names:
        if name.startswith("DADAPT"):
            choice = OptimizerChoice("prodigy")
        options.drop(kind, f"there is no {shown(kind.value)}; choose --lr anew")
    train.set("optimizer", choice.name, kind, choice.note)
    if choice.rate is not None:
        options.drop(rate, choice.reason)
        for label in options.get("optimizer.relative_step", bool).labels:
            options.report.write([label], f"train: lr = {choice.rate}")
        train.set("lr", choice.rate, Given(None), default=choice.reason)
    else:
        train.set("lr", value, rate, default="learning_rate is 3e-6 for OneTrainer")
    decay = options.get("optimizer.weight_decay", float)
    if decay.value is not None:
        train.set("weight_decay", decay.value, decay)
    elif name in ("ADAFACTOR", "PRODIGY"):
        train.set("weight_decay", 0.0, Given(0.0), default=f"weight_decay of {name} is 0")
    fused = options.get("optimizer.fused_back_pass", bool, False)
    if fused.value and is_lora:
        options.drop(fused, "of a whole UNet; a LoRA's gradients are small")
    elif fused.value:
        train.set("fused_backward", True, fused)


def _rate_scale(train: Recipe, options: Options) -> float:
    """By how much learning_rate_scaler multiplies the rate, for one process."""
    given = options.get("learning_rate_scaler", str, "NONE")
    batch, accumulate = _batch(train)
    scales = {"NONE": 1, "BATCH": batch, "GLOBAL_BATCH": batch, "GRADIENT_ACCUMULATION": accumulate}
    scales |= {"BOTH": batch * accumulate, "GLOBAL_BOTH": batch * accumulate}
    if given.value not in scales:
        raise options.fail("learning_rate_scaler", f"{shown(given.value)} is not known")
    scale = float(max(1, scales[given.value]) ** 0.5)
    options.report.write(given.labels, f"train: lr is multiplied by {scale:g}")
    return scale


def _batch(train: Recipe) -> tuple[int, int]:
    """Batch size and accumulation; both are checked with the recipe."""
    batch, accumulate = (train.options.get(name, 1) for name in ("batch_size", "accumulate"))
    return max(1, int(batch)), max(1, int(accumulate))


def _write_schedule(train: Recipe, options: Options, num_samples: int | None) -> None:
    given = options.get("learning_rate_scheduler", str, "CONSTANT")
    schedule = _SCHEDULES.get(given.value, "constant")
    if given.value not in _EXACT_SCHEDULES:
        options.drop(given, f"there is no {shown(given.value)}")
    train.set("lr_schedule", schedule, given)
    cycles = options.get("learning_rate_cycles", float)
    if cycles.value and schedule == "cosine-restarts":
        train.set("num_cycles", max(1, round(cycles.value)), cycles)
    warmup = options.get("learning_rate_warmup_steps", float, 200.0)
    batch, accumulate = _batch(train)
    if warmup.value > 1:
        steps: int | None = int(warmup.value / accumulate)
    elif warmup.value <= 0:
        steps = 0
    elif num_samples is None:
        options.drop(
            warmup,
            "a share of a length that is not known, as the images were not found; "
            "give --warmup-steps",
        )
        steps = None
    else:
        epochs = int(train.options["epochs"])
        steps = int(warmup.value * epochs * steps_per_epoch(num_samples, batch, accumulate))
    if steps:
        train.set("warmup_steps", steps, warmup, default="OneTrainer warms up for 200 batches")


def _write_objective(train: Recipe, options: Options) -> None:
    mse, mae = (options.get(f"{name}_strength", float) for name in ("mse", "mae"))
    huber, delta = options.get("huber_strength", float), options.get("huber_delta", float, 1.0)
    mse_strength = 1.0 if mse.value is None else mse.value
    given = Given(None, (*mse.labels, *mae.labels, *huber.labels))
    if not mse_strength and huber.value:
        train.set("loss", "huber", given)
        train.set("huber_delta", delta.value, delta, default="huber_delta is 1 for OneTrainer")
    elif not mse_strength and mae.value:
        train.set("loss", "huber", given)
        train.set("huber_delta", 0.01, mae, "as good as mae")
    else:
        for other in (mae, huber):
            if other.value:
                options.drop(other, "losses are not added up: mse alone")
        if not mse_strength:
            options.drop(mse, "there must be a loss: mse")
    weight = options.get("loss_weight_fn", str, "CONSTANT")
    strength = options.get("loss_weight_strength", float, 5.0)
    if weight.value == "MIN_SNR_GAMMA":
        train.set("min_snr_gamma", strength.value, Given(None, (*weight.labels, *strength.labels)))
    elif weight.value != "CONSTANT":
        options.drop(weight, f"there is no {shown(weight.value)}: not weighed")
    for name, kind in (
        ("force_epsilon_prediction", "epsilon"),
        ("force_v_prediction", "v_prediction"),
    ):
        force = options.get(name, bool, False)
        if force.value:
            train.set("prediction_type", kind, force)
    low = options.get("min_noising_strength", float, 0.0)
    high = options.get("max_noising_strength", float, 1.0)
    if low.value or high.value != 1:
        span = [int(1000 * low.value), int(1000 * high.value)]
        train.set("timestep_range", span, Given(None, (*low.labels, *high.labels)))
    _write_timesteps(train, options)
    dropout = options.get("text_encoder.dropout_probability", float, 0.0)
    if dropout.value:
        train.set("caption_dropout", dropout.value, dropout)


def _write_timesteps(train: Recipe, options: Options) -> None:
    given = options.get("timestep_distribution", str, "UNIFORM")
    bias, weight = (options.get(f"noising_{name}", float) for name in ("bias", "weight"))
    if given.value == "LOGIT_NORMAL":
        train.set("timesteps", "logit-normal", given)
        if bias.value:
            train.set("logit_mean", bias.value, bias)
        if weight.value:
            train.set("logit_std", 1 + weight.value, weight)
    elif given.value != "UNIFORM":
        options.drop(given, f"there is no {shown(given.value)}: uniform")


def _write_memory(train: Recipe, options: Options, is_lora: bool) -> None:
    given = options.get("train_dtype", str, "FLOAT_16")
    if given.value not in _DTYPES:
        raise options.fail("train_dtype", f"{shown(given.value)} is no precision to train in")
    precision = _DTYPES[given.value]
    weights = options.get("unet.weight_dtype", str, "FLOAT_32")
    default = "train_dtype is FLOAT_16 for OneTrainer"
    if not is_lora and weights.value == "BFLOAT_16":
        train.set("pure_bf16", True, weights)
        if precision == "fp16":
            options.drop(given, "--pure-bf16 computes in bf16")
            precision, default = "bf16", "weights in bf16 are computed in it"
    elif is_lora and weights.value == "NFLOAT_4":
        train.set("base_quant", "nf4", weights)
    elif is_lora and weights.value not in _DTYPES:
        train.set("base_quant", "int8", weights)
    elif is_lora:
        options.report.write(weights.labels, "train: the frozen base is held in --precision")
    elif weights.value not in ("FLOAT_32", "TFLOAT_32"):
        options.drop(weights, "weights are fp32, or with BFLOAT_16 bf16")
    train.set("precision", precision, given, default=default)
    _write_average(train, options)
    for name in ("unet.gradient_checkpointing", "gradient_checkpointing"):
        text = options.get(name, str) if _is_text(options, name) else options.get(name, bool)
        if text.value is not None:
            is_on = text.value in (True, "ON", "CPU_OFFLOADED")
            train.set("gradient_checkpointing", is_on, text)


def _write_average(train: Recipe, options: Options) -> None:
    """OneTrainer's decay is of an update, at every Nth step; ours is of a step."""
    place = options.get("ema", str, "OFF")
    interval = options.get("ema_update_step_interval", int, 5)
    decay = options.get("ema_decay", float, 0.999)
    if place.value not in ("GPU", "CPU"):
        return
    if interval.value < 1 or not 0 < decay.value < 1:
        raise options.fail("ema_decay", "must be between 0 and 1, of steps from 1 on")
    value = round(decay.value ** (1 / interval.value), 9)
    default = "ema_decay is 0.999 for OneTrainer, at every fifth step"
    train.set("ema", value, decay, default=default)
    if place.value == "CPU":
        train.set("ema_on_cpu", True, place)
    else:
        options.report.write(place.labels, "train: ema")
    if interval.value > 1:
        train.set("ema_every", interval.value, interval, default=default)


def _is_text(options: Options, name: str) -> bool:
    return isinstance(options.levels[0].values.get(name), str)


def _every(
    options: Options, name: str, train: Recipe, default: tuple[int, str]
) -> tuple[str, Given]:
    """An interval of ours; empty if there is none."""
    amount = options.get(name, int, default[0])
    unit = options.get(f"{name}_unit", str, default[1])
    given = Given(None, (*amount.labels, *unit.labels))
    if unit.value == "EPOCH" and amount.value > 0:
        return f"{amount.value}ep", given
    if unit.value == "STEP" and amount.value > 0:
        return str(max(1, amount.value // _batch(train)[1])), given
    if unit.value not in ("NEVER", "EPOCH", "STEP"):
        options.drop(given, f"not by {shown(unit.value)}: an interval is in steps or epochs")
    return "", given


def _write_intervals(train: Recipe, options: Options) -> None:
    save, given = _every(options, "save_every", train, (0, "NEVER"))
    backup, second = _every(options, "backup_after", train, (30, "MINUTE"))
    if save:
        train.set("checkpoint_every", save, given)
    elif backup:
        train.set("checkpoint_every", backup, second)
    rolling, count = (
        options.get("rolling_backup", bool, False),
        options.get("rolling_backup_count", int, 3),
    )
    if rolling.value:
        train.set("keep", count.value, Given(None, (*rolling.labels, *count.labels)))
    validation = options.get("validation", bool, False)
    every, given = _every(options, "validate_after", train, (1, "EPOCH"))
    if validation.value and every:
        train.set("eval_every", every, Given(None, (*validation.labels, *given.labels)))


# Samples


def _write_prompts(conversion: Conversion, options: Options) -> None:
    given = options.get("samples", list)
    source, entries = options.levels[0].path, given.value
    every, interval = _every(options, "sample_after", conversion.train, (10, "MINUTE"))
    if entries is None:
        given = options.get("sample_definition_file_name", str)
        if given.value is None:
            return
        source = Path(located(given.value, source))
        if not source.is_file():
            options.drop(given, "no such file here; give encode --preview-prompts FILE")
            return
        entries = read_json(source)
    if not isinstance(entries, list) or len(entries) > MAX_PROMPTS:
        raise ValueError(f"{source}: the samples must be a list of at most {MAX_PROMPTS:,}")
    left_out: dict[str, None] = {}
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict):
            raise ValueError(f"{source}: sample {number} must be an object, not {shown(entry)}")
        level = Level(source, f"samples[{number}].", entry)
        prompt, dropped = _prompt(Options(Report(()), (level,)))
        left_out |= dict.fromkeys(dropped)
        if prompt:
            conversion.prompts.append(prompt)
    if not conversion.prompts:
        return
    note = f"left out: {', '.join(left_out)}" if left_out else ""
    conversion.add_generate(given, note)
    write_base(conversion.generate, options)
    if every:
        conversion.train.set("preview_every", every, interval)


def _prompt(options: Options) -> tuple[dict[str, Any], list[str]]:
    """A sample as a prompt of ours; empty if it is not enabled or has no text."""
    text = options.get("prompt", str, "").value
    if not options.get("enabled", bool, True).value or not text.strip():
        return {}, []
    prompt = {"text": text, "negative": options.get("negative_prompt", str, "").value}
    prompt |= {"width": options.get("width", int, 1024).value}
    prompt |= {"height": options.get("height", int, 1024).value}
    prompt |= {"num_steps": options.get("diffusion_steps", int, 30).value}
    prompt |= {"guidance_scale": options.get("cfg_scale", float, 7.0).value}
    if not options.get("random_seed", bool, False).value:
        prompt |= {"seed": options.get("seed", int, 42).value}
    sampler = options.get("noise_scheduler", str, "DDIM").value
    dropped = fit_prompt(prompt)
    if sampler in _SAMPLERS:
        prompt["sampler"] = _SAMPLERS[sampler]
    else:
        dropped.append(f"noise_scheduler {shown(sampler)}")
    try:
        check_prompt(json.loads(json.dumps(prompt)))
    except ValueError as error:
        level = options.levels[0]
        raise ValueError(f"{level.path}: {level.prefix[:-1]}: {error}") from None
    return prompt, dropped
