"""Converts configs of kohya's sd-scripts: what the options mean there, in our recipes."""

import ast
import re
from math import floor
from pathlib import Path
from typing import Any

from convert.kohya_datasets import (
    Subset,
    read_subsets,
    read_toml,
    write_base,
    write_encodes,
)
from convert.prompts import read_kohya_prompts, sampler_of
from convert.recipes import (
    Conversion,
    OptimizerChoice,
    Recipe,
    choose_adafactor,
    copy_rows,
    every,
    located,
    same_in_all,
    steps_per_epoch,
    write_trackers,
)
from convert.tables import Given, Options, Report, read_table, shown

_OTHER_NETWORKS = r"flux|sd3|lumina|anima|hunyuan|chroma"
_OTHER_OPTIONS = ("clip_l", "clip_g", "t5xxl", "ae", "gemma2", "qwen3", "model_type")
_OTHER_BASES = re.compile(
    r"(stable-diffusion|sd)[-_ ]?v?(1[-._]?[1-5]|2[-._]?[01]?)(?![0-9])|(^|/)v1-5-pruned"
    r"|flux[._-]?1|(sd|stable-diffusion-)3"
)
_OPTIMIZERS = {
    "adamw": ("adamw", ""),
    "pagedadamw": ("adamw", "not paged"),
    "pagedadamw32bit": ("adamw", "not paged"),
    "adamw8bit": ("adamw8bit", ""),
    "pagedadamw8bit": ("adamw8bit", "not paged"),
    "adafactor": ("adafactor", ""),
    "prodigy": ("prodigy", ""),
}
_SCHEDULES = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_restarts": "cosine-restarts",
    "cosine_with_min_lr": "cosine",
}


def convert_kohya(config: Path, datasets: Path | None, out: Path) -> Conversion:
    """The recipes of a config and a dataset config of kohya's.

    Raises:
        ValueError: a file or a value that cannot be read, or no SDXL; names file and option.
        OSError: a file cannot be read.
    """
    values = _flat(config, read_toml(config))
    report = Report(read_table("kohya"))
    top = report.level(config, "", values)
    options = Options(report, (top,))
    if datasets is None and values.get("dataset_config") is not None:
        given = options.get("dataset_config", str)
        datasets = Path(located(given.value, config))
        report.write(given.labels, f"read: {datasets}")
    _refuse_others(options)
    output = Path(options.get("output_dir", str, "output").value)
    name = options.get("output_name", str, "last").value
    conversion = Conversion("kohya", config, out, report, output / name)
    for key in ("output_dir", "output_name"):
        report.write(options.get(key, str).labels, f"train: out = {shown(str(output / name))}")
    subsets = [*read_subsets(options, conversion, datasets)]
    if not subsets:
        raise ValueError(f"{datasets or config}: names no dataset that is trained on")
    _write_train(conversion, options, subsets)
    write_encodes(conversion, options, subsets)
    _write_prompts(conversion, options)
    return conversion


def _flat(path: Path, tables: dict[str, Any]) -> dict[str, Any]:
    """The options of all sections: kohya's scripts put them together."""
    values: dict[str, Any] = {}
    for name, value in tables.items():
        for key, part in value.items() if isinstance(value, dict) else [(name, value)]:
            if key in values:
                raise ValueError(f"{path}: {shown(key)} is given in two sections; keep one")
            values[key] = part
    return values


def _refuse_others(options: Options) -> None:
    """Refuse configs of models that are no SDXL, as far as they can be told.

    Raises:
        ValueError: names the option that tells it.
    """
    given = options.get("pretrained_model_name_or_path", str)
    base = (given.value or "").lower()
    if options.get("v2", bool, False).value:
        raise options.fail("v2", "is Stable Diffusion 2; only SDXL can be trained")
    module = options.get("network_module", str, "").value
    if re.search(_OTHER_NETWORKS, module.lower()):
        raise options.fail("network_module", f"{shown(module)} is not of SDXL")
    for name in _OTHER_OPTIONS:
        if name in options.levels[0].values:
            raise options.fail(name, "is of another model than SDXL, which alone can be trained")
    if "xl" not in base and _OTHER_BASES.search(base):
        raise options.fail(
            "pretrained_model_name_or_path",
            f"{shown(given.value)} is no SDXL by its name; only SDXL can be trained",
        )
    if not base:
        raise options.fail("pretrained_model_name_or_path", "is missing; name an SDXL base")
    if options.get("network_train_text_encoder_only", bool, False).value:
        raise options.fail(
            "network_train_text_encoder_only", "text encoders cannot be trained here"
        )


# Training


def _write_train(conversion: Conversion, options: Options, subsets: list[Subset]) -> None:
    train = conversion.train
    write_base(train, options)
    names = options.levels[0].values
    is_lora = any(
        f"network_{name}" in names for name in ("module", "dim", "alpha", "weights", "args")
    )
    copy_rows(train, options)
    if is_lora:
        _write_lora(train, options)
        if not options.get("network_train_unet_only", bool, False).value:
            conversion.notes.append(
                "kohya would train the text encoders too (no network_train_unet_only); here the "
                "UNet alone is trained"
            )
    else:
        train.set("full", True, Given(True), default="no network_module: the whole UNet is trained")
    batch_size = _batch_size(train, subsets)
    _write_length(train, options)
    _write_optimizer(train, options, is_lora)
    _write_schedule(train, options, subsets, batch_size)
    _write_objective(train, options, subsets)
    _write_memory(train, options, is_lora)
    _write_intervals(train, options)


def _arguments(options: Options, name: str) -> Options:
    """``["a=1", "b=2"]`` as options of their own, whose rows are named ``NAME.a``."""
    given = options.get(name, list, [])
    values: dict[str, Any] = {}
    for part in given.value:
        key, equals, text = part.partition("=") if isinstance(part, str) else ("", "", "")
        if not equals or len(text) > 1000:
            raise options.fail(name, f"must be a list of name=value, not {shown(part)}")
        values[key.strip()] = _literal(text)
    top = options.levels[0]
    top.values.pop(name, None)  # its parts are accounted for one by one
    return Options(
        options.report, (options.report.level(top.path, f"{name}.", values, f"{name}."),)
    )


def _literal(text: str) -> Any:
    """A Python literal, as kohya reads these; else the text itself."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return text.strip()


def _write_lora(train: Recipe, options: Options) -> None:
    module = options.get("network_module", str, "networks.lora")
    arguments = _arguments(options, "network_args")
    weights = options.get("network_weights", str)
    algo = arguments.get("algo", str, "lora")
    conv = arguments.get("conv_dim", int)
    note, is_lycoris = "", module.value.startswith("lycoris")
    if not is_lycoris and module.value not in ("networks.lora", "networks.lora_fa"):
        note = f"instead of {shown(module.value)} a LoRA is trained"
        options.drop(module, note)
    if algo.value.lower() not in ("lora", "locon"):
        options.drop(algo, f"instead of {shown(algo.value)} a LoRA is trained")
    if weights.value:
        path = located(weights.value, options.levels[-1].path)
        train.set("init_lora", path, weights)
        for given in (options.get("network_dim", int), options.get("network_alpha", float), conv):
            options.drop(given, "--init-lora brings its own")
        return
    rank = options.get("network_dim", int, 4)
    alpha = options.get("network_alpha", float, 1.0)
    train.set("rank", rank.value, rank, default="network_dim is 4 for kohya")
    train.set("alpha", alpha.value, alpha, default="network_alpha is 1 for kohya")
    labels = Given("all", (*module.labels, *algo.labels))
    train.set("targets", "all", labels, default="kohya adapts all linear layers")
    if conv.value or (is_lycoris and not arguments.levels[0].values.get("preset")):
        train.set(
            "conv",
            True,
            conv,
            "with the rank of the other layers",
            default="LyCORIS adapts convolutions too",
        )
    dora = arguments.get("dora_wd", bool)
    if dora.value:
        train.set("adapter", "dora", dora)


def _batch_size(train: Recipe, subsets: list[Subset]) -> int:
    sizes = [subset.options.get("batch_size", int, 1) for subset in subsets]
    train.set("batch_size", sizes[0].value, sizes[0])
    if not same_in_all(sizes):
        for size in sizes[1:]:
            if size.value != sizes[0].value:
                subsets[0].options.drop(size, f"one for the run: {sizes[0].value}, of the first")
    if sizes[0].value < 1:
        raise subsets[0].options.fail("batch_size", "must be at least 1")
    return int(sizes[0].value)


def _write_length(train: Recipe, options: Options) -> None:
    epochs, steps = options.get("max_train_epochs", int), options.get("max_train_steps", int, 1600)
    if epochs.value is not None:
        train.set("epochs", epochs.value, epochs)
        options.drop(steps, "max_train_epochs has the say, as there")
    else:
        train.set("steps", steps.value, steps, default="max_train_steps is 1600 for kohya")


def _write_optimizer(train: Recipe, options: Options, is_lora: bool) -> None:
    kind = options.get("optimizer_type", str)
    for name, other in (("use_8bit_adam", "AdamW8bit"), ("use_lion_optimizer", "Lion")):
        switch = options.get(name, bool, False)
        if switch.value:
            kind = Given(other, switch.labels)
    name = (kind.value or "AdamW").lower()
    optimizer, note = _OPTIMIZERS.get(name, ("adamw", ""))
    if name not in _OPTIMIZERS:
        if name.startswith("dadapt"):
            optimizer = "prodigy"  # it finds its rate too; AdamW at a rate of 1 would diverge
        options.drop(kind, f"there is no {shown(kind.value)}; choose --lr anew")
    rate = options.get("learning_rate", float, 2e-6)
    unet_rate = options.get("unet_lr", float)
    if is_lora and unet_rate.value is not None:
        options.drop(rate, "unet_lr has the say, as there")
        rate = unet_rate
    elif unet_rate.value is not None:
        options.drop(unet_rate, "of a LoRA; learning_rate has the say, as there")
    arguments = _arguments(options, "optimizer_args")
    choice = OptimizerChoice(optimizer, note)
    labels = kind.labels
    if name == "adafactor":
        flags = [arguments.get(flag, bool, True) for flag in ("relative_step", "scale_parameter")]
        choice = choose_adafactor(flags[0].value, flags[1].value, is_lora)
        flags.append(arguments.get("warmup_init", bool))
        labels = (*labels, *(label for flag in flags for label in flag.labels))
    train.set("optimizer", choice.name, Given(None, labels), choice.note)
    if choice.rate is not None:
        options.drop(rate, choice.reason)
        train.set("lr", choice.rate, Given(None), default=choice.reason)
    else:
        train.set("lr", rate.value, rate, default="learning_rate is 2e-6 for kohya")
    decay = arguments.get("weight_decay", float)
    if decay.value is not None:
        train.set("weight_decay", decay.value, decay)
    elif name in ("adafactor", "prodigy"):
        train.set("weight_decay", 0.0, Given(0.0), default=f"weight_decay is 0 in kohya's {name}")


def _write_schedule(
    train: Recipe, options: Options, subsets: list[Subset], batch_size: int
) -> None:
    given = options.get("lr_scheduler", str, "constant")
    power = options.get("lr_scheduler_power", float, 1.0)
    schedule = _SCHEDULES.get(given.value, "constant")
    if given.value == "polynomial" and power.value == 1:
        schedule = "linear"
    elif given.value == "cosine_with_min_lr" or given.value not in _SCHEDULES:
        options.drop(given, f"there is no {shown(given.value)}")
    train.set("lr_schedule", schedule, given)
    cycles = options.get("lr_scheduler_num_cycles", int)
    if cycles.value and schedule == "cosine-restarts":
        train.set("num_cycles", cycles.value, cycles)
    warmup = options.get("lr_warmup_steps", str, "0")
    text = warmup.value.strip()
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1e9:
        raise options.fail("lr_warmup_steps", f"must be steps or a share, not {shown(text)}")
    steps: int | None = int(share)
    if 0 < share < 1:
        total = _num_steps(train, subsets, batch_size)
        steps = None if total is None else int(share * total)
        if steps is None:
            options.drop(
                warmup,
                "a share of a length that is not known, as the images were not "
                "found; give --warmup-steps",
            )
    if steps:
        train.set("warmup_steps", steps, warmup)


def _num_steps(train: Recipe, subsets: list[Subset], batch_size: int) -> int | None:
    if "steps" in train.options:
        return int(train.options["steps"])
    nums = [subset.num_samples for subset in subsets if not subset.is_reg.value]
    if None in nums or not any(nums):
        return None
    num_samples = sum(num for num in nums if num)
    if any(subset.is_reg.value for subset in subsets):
        num_samples *= 2
    accumulate = max(1, int(train.options.get("accumulate", 1)))
    return int(train.options["epochs"]) * steps_per_epoch(num_samples, batch_size, accumulate)


def _write_objective(train: Recipe, options: Options, subsets: list[Subset]) -> None:
    given = options.get("v_parameterization", bool, False)
    kind = "v_prediction" if given.value else "epsilon"
    train.set("prediction_type", kind, given, default="no v_parameterization")
    given = options.get("zero_terminal_snr", bool, False)
    train.set("zero_terminal_snr", given.value, given, default="no zero_terminal_snr")
    loss, delta = options.get("loss_type", str, "l2"), options.get("huber_c", float)
    if loss.value in ("huber", "smooth_l1"):
        train.set("loss", "huber", loss)
        if delta.value is not None:
            train.set("huber_delta", delta.value, delta)
    elif loss.value == "l1":
        train.set("loss", "huber", loss)
        train.set("huber_delta", 0.01, loss, "as good as l1")
    elif loss.value != "l2":
        raise options.fail(
            "loss_type", f"must be l1, l2, huber or smooth_l1, not {shown(loss.value)}"
        )
    low, high = options.get("min_timestep", int, 0), options.get("max_timestep", int, 1000)
    if low.value or high.value != 1000:
        span = Given(None, (*low.labels, *high.labels))
        train.set("timestep_range", [low.value, high.value], span)
    rates = [subset.options.get("caption_dropout_rate", float, 0.0) for subset in subsets]
    lowest = min(rates, key=lambda rate: float(rate.value))
    if lowest.value:
        train.set("caption_dropout", lowest.value, lowest)
    for rate in rates:
        if rate.value != lowest.value:
            options.drop(rate, f"one rate for the run, the lowest: {lowest.value}")
    alphas = [subset.options.get("alpha_mask", bool, False) for subset in subsets]
    for alpha in alphas:
        if alpha.value:
            train.set("masked_loss", True, alpha)


def _write_memory(train: Recipe, options: Options, is_lora: bool) -> None:
    given = options.get("mixed_precision", str, "no")
    if given.value not in ("no", "fp16", "bf16"):
        raise options.fail("mixed_precision", f"must be no, fp16 or bf16, not {given.value[:40]!r}")
    precision = given.value if given.value != "no" else "fp32"
    train.set("precision", precision, given, default="mixed_precision is no for kohya")
    given = options.get("gradient_checkpointing", bool)
    if given.value is not None:
        train.set("gradient_checkpointing", given.value, given)
    given = options.get("full_bf16", bool, False)
    if given.value and is_lora:
        options.drop(given, "a LoRA's weights are always fp32; its base is in --precision")
    elif given.value:
        train.set("pure_bf16", True, given)
    for name in ("fp8_base", "fp8_base_unet"):
        given = options.get(name, bool, False)
        if given.value and is_lora:
            train.set("base_quant", "int8", given)
        elif given.value:
            options.drop(given, "of a LoRA's frozen base")
    for name, kind in (("fused_backward_pass", bool), ("fused_optimizer_groups", int)):
        given = options.get(name, kind)
        if given.value and is_lora:
            options.drop(given, "of a whole UNet; a LoRA's gradients are small")
        elif given.value:
            train.set("fused_backward", True, given)


def _write_intervals(train: Recipe, options: Options) -> None:
    interval, given = every(options, "save_every_n_epochs", "save_every_n_steps")
    ratio, epochs = options.get("save_n_epoch_ratio", int), options.get("max_train_epochs", int)
    if ratio.value and ratio.value > 0:
        if epochs.value:
            interval, given = f"{max(1, floor(epochs.value / ratio.value))}ep", ratio
        else:
            options.drop(ratio, "without max_train_epochs; give --checkpoint-every")
    if interval:
        train.set("checkpoint_every", interval, given)
    last = options.get("save_last_n_epochs", int)
    if last.value and interval.endswith("ep"):
        train.set("keep", last.value, last)
    last = options.get("save_last_n_steps", int)
    if last.value and interval and not interval.endswith("ep"):
        train.set("keep", last.value // int(interval) + 1, last)
    interval, given = every(options, "validate_every_n_epochs", "validate_every_n_steps")
    if interval:
        train.set("eval_every", interval, given)
    write_trackers(train, options, "log_with", "log_tracker_name", "wandb_run_name")


def _write_prompts(conversion: Conversion, options: Options) -> None:
    """Sample prompts: previews of the run, and a generate after it."""
    given = options.get("sample_prompts", str)
    interval, by = every(options, "sample_every_n_epochs", "sample_every_n_steps")
    sampler = options.get("sample_sampler", str, "ddim")
    if not given.value:
        return
    path = Path(located(given.value, options.levels[0].path))
    if not path.is_file():
        options.drop(given, "no such file here; give encode --preview-prompts FILE")
        options.drop(by, "without the prompts there are no previews")
        return
    conversion.prompts, left_out = read_kohya_prompts(path)
    note = f"left out of prompts: {', '.join(left_out)}" if left_out else ""
    conversion.add_generate(given, note)
    if interval:
        conversion.train.set("preview_every", interval, by)
    write_base(conversion.generate, options)
    name = sampler_of(sampler.value)
    if name is None:
        options.drop(sampler, f"there is no {shown(sampler.value)}: the base's own sampler")
    else:
        conversion.generate.set("sampler", name, sampler, default="kohya's samples are of ddim")
    conversion.generate.set(
        "guidance_scale", 7.5, Given(7.5), default="kohya's samples have a scale of 7.5"
    )
