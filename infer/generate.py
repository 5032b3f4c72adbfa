"""The stage: prompts to pictures. All text first, then the UNet and the VAE; each PNG says how."""

import copy
import gc
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin
from tqdm import tqdm

from infer.settings import GenerateSettings
from sdxl.base import model_config, scheduler_config, vae_config
from sdxl.conditioning import Conditioning, TextEncoders
from sdxl.device import exact_fp32, pick_device, pick_precision
from sdxl.fingerprint import config_digest, file_digest, weights_digest
from sdxl.load import load_scheduler, load_unet, load_unet_folder, load_vae
from sdxl.long_captions import read_long_captions
from sdxl.lora_files import LORA, load_lora, read_num_chunks, read_schedule
from sdxl.prompts import Prompt, parse_prompt, read_prompts
from sdxl.sampling import decode_latents, default_time_ids, sample_latents, starting_noise
from sdxl.schedule import Schedule, schedule_beside
from sdxl.sheet import contact_sheet

SETTINGS_KEY = "shardtune"
SHEET = "contact-sheet.png"


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One picture, with all that it takes but the weights. Sizes in pixels."""

    number: int
    prompt: str
    negative: str | None
    width: int
    height: int
    seed: int
    num_steps: int
    guidance_scale: float

    @property
    def name(self) -> str:
        return f"{self.number:06d}.png"

    @property
    def kind(self) -> tuple[int, int, int, float]:
        """What pictures of one batch have in common."""
        return self.width, self.height, self.num_steps, self.guidance_scale


@dataclass
class Report:
    num_drawn: int
    num_kept: int
    sheet: Path


def generate(settings: GenerateSettings) -> Report:
    """Draw what is missing or was drawn with other settings.

    Raises:
        ValueError: the prompts, the base, the weights or the folder cannot be used.
    """
    if settings.prompt is not None:
        prompts = [parse_prompt(settings.prompt)]
    else:
        assert settings.prompts is not None
        prompts = read_prompts(settings.prompts)
    _, unet_config = model_config(settings.base, "unet")
    drawings = plan_drawings(settings, prompts, unet_config["sample_size"] * 8)
    device = pick_device(settings.device)
    name = "fp16" if settings.precision == "auto" and device.type == "cuda" else settings.precision
    dtype = pick_precision(name, device).dtype
    weights = _weights(settings) | {"dtype": str(dtype).removeprefix("torch.")}
    if any(part.exists() and not part.is_dir() for part in (settings.out, *settings.out.parents)):
        raise ValueError(f"{settings.out}: not a folder")
    settings.out.mkdir(parents=True, exist_ok=True)
    wanted = _missing(settings.out, drawings, weights)
    if wanted:
        conditioning = _encode_prompts(settings, wanted, dtype, device)
        _draw_all(settings, wanted, conditioning, weights, dtype, device)
    captions = [{"file_name": one.name, "text": one.prompt} for one in drawings]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in captions]
    _replace(settings.out / "captions.jsonl", "".join(lines).encode())
    sheet = contact_sheet([(settings.out / one.name, one.prompt) for one in drawings])
    sheet.save(settings.out / SHEET)
    return Report(len(wanted), len(drawings) - len(wanted), settings.out / SHEET)


def plan_drawings(
    settings: GenerateSettings, prompts: list[Prompt], default_side: int
) -> list[Drawing]:
    """``num_images`` pictures, prompts in rotation; what a line says wins over the settings.

    Picture i has seed + i. A line's own seed grows by one each time the line comes round.
    """
    width, height = settings.pixels or (default_side, default_side)
    drawings = []
    for number in range(settings.num_images or len(prompts)):
        turn, which = divmod(number, len(prompts))
        prompt = prompts[which]
        seed = settings.seed + number if prompt.seed is None else prompt.seed + turn
        seed %= 2**63
        drawings.append(
            Drawing(
                number=number,
                prompt=prompt.text,
                negative=settings.negative if prompt.negative is None else prompt.negative,
                width=prompt.width or width,
                height=prompt.height or height,
                seed=seed,
                num_steps=prompt.num_steps or settings.num_steps,
                guidance_scale=_first(prompt.guidance_scale, settings.guidance_scale),
            )
        )
    return drawings


def _first(own: float | None, default: float) -> float:
    return default if own is None else own


def _weights(settings: GenerateSettings) -> dict[str, Any]:
    """Digests of all weights that make the pictures, and the sampler."""
    base, vae = settings.base, settings.vae or settings.base
    configs = {name: model_config(base, name) for name in ("text_encoder", "text_encoder_2")}
    configs["vae"] = vae_config(vae)
    digests: dict[str, Any] = {
        part: weights_digest(path, part) for part, (path, _) in configs.items()
    }
    unet = model_config(base, "unet")[0] if settings.unet is None else _unet_folder(settings.unet)
    digests["unet"] = weights_digest(unet, "unet")
    if settings.lora is not None:
        digests["lora"] = file_digest(_lora_file(settings.lora))
    scheduler = scheduler_config(base) | asdict(_schedule(settings))
    digests["sampler"] = scheduler.get("_class_name")
    for part, (_, config) in configs.items():
        digests[f"{part}_config"] = config_digest(config)
    digests["scheduler_config"] = config_digest(scheduler)
    if (num_chunks := _num_chunks(settings)) > 1:
        digests["long_captions"] = num_chunks
    return digests


def _schedule(settings: GenerateSettings) -> Schedule:
    """What the fine-tune predicts and on which schedule, where it says so."""
    found = Schedule()
    if settings.unet is not None:
        found = schedule_beside(_unet_folder(settings.unet))
    if settings.lora is not None:
        of_lora = read_schedule(_lora_file(settings.lora))
        found = of_lora if of_lora.prediction_type is not None else found
    return found


def _num_chunks(settings: GenerateSettings) -> int:
    """In how many chunks the fine-tune learned its captions."""
    if settings.lora is not None:
        return read_num_chunks(_lora_file(settings.lora))
    return 1 if settings.unet is None else read_long_captions(_unet_folder(settings.unet))


def _lora_file(path: Path) -> Path:
    file = path / LORA if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file}: no such LoRA file")
    return file


def _unet_folder(path: Path) -> Path:
    return path / "unet" if (path / "unet" / "config.json").is_file() else path


def _missing(out: Path, drawings: list[Drawing], weights: dict[str, Any]) -> list[Drawing]:
    """The drawings that are not there as asked; warns of those that are there otherwise."""
    stale = {one: _stale_because(out / one.name, _record(one, weights)) for one in drawings}
    for reason in sorted({why for why in stale.values() if why}):
        names = [one.name for one, why in stale.items() if why == reason]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        warnings.warn(f"{out / names[0]}{more}: drawn again: {reason}", stacklevel=2)
    return [one for one, why in stale.items() if why is not None]


def _stale_because(path: Path, asked: dict[str, Any]) -> str | None:
    """Why a picture must be drawn (again); empty where it is missing, None where it is as asked."""
    if not path.exists():
        return ""
    try:
        with Image.open(path) as image:
            recorded = json.loads(image.info[SETTINGS_KEY])
            image.load()
    except (OSError, SyntaxError, ValueError):
        return "damaged"
    except KeyError:
        raise ValueError(f"{path}: not drawn by shardtune; give another --out") from None
    changed = sorted(name for name in asked if recorded.get(name) != asked[name])
    return f"{', '.join(changed)} changed" if changed else None


def _record(drawing: Drawing, weights: dict[str, Any]) -> dict[str, Any]:
    return {**asdict(drawing), "weights": weights}


def _encode_prompts(
    settings: GenerateSettings, drawings: list[Drawing], dtype: torch.dtype, device: torch.device
) -> dict[str | None, Conditioning]:
    """Each different text once; None is the base's unconditional. The encoders are gone after."""
    num_chunks = _num_chunks(settings)
    encoders = TextEncoders(settings.base, dtype, device, settings.tokenizers, num_chunks)
    texts = {text for one in drawings for text in (one.prompt, one.negative) if text}
    found = encoders.encode_each(texts, settings.batch_size)
    if cut := sorted(text for text in texts if encoders.is_cut(text)):
        warnings.warn(
            f"{len(cut)} prompts are cut at {77 * num_chunks} tokens, e.g. {cut[0][:60]!r}",
            stacklevel=2,
        )
    del encoders
    gc.collect()
    return found


def _draw_all(
    settings: GenerateSettings,
    drawings: list[Drawing],
    conditioning: dict[str | None, Conditioning],
    weights: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    if settings.unet is not None:
        unet: Any = load_unet_folder(_unet_folder(settings.unet), dtype)
    else:
        unet = load_unet(settings.base, dtype)
    if settings.lora is not None:
        load_lora(unet, _lora_file(settings.lora))
    unet.to(device=device, dtype=dtype)
    vae = load_vae(settings.vae or settings.base, torch.float32).to(device)
    schedule = _schedule(settings)
    scheduler = load_scheduler(settings.base, schedule.prediction_type, schedule.zero_snr)
    exact_fp32()
    with tqdm(total=len(drawings), unit="img", desc="draw") as bar:
        for batch in _batches(drawings, settings.batch_size):
            bar.set_postfix_str(f"{batch[0].num_steps} steps at {batch[0].width}x{batch[0].height}")
            pictures = draw(scheduler, unet, vae, batch, conditioning)
            for drawing, picture in zip(batch, pictures, strict=True):
                _save(settings.out / drawing.name, picture, drawing, weights)
            bar.update(len(batch))


def _batches(drawings: list[Drawing], size: int) -> Iterator[list[Drawing]]:
    """Batches of one kind each, in the order of the numbers where that is possible."""
    for _, group in groupby(sorted(drawings, key=lambda d: d.kind), key=lambda d: d.kind):
        members = list(group)
        for start in range(0, len(members), size):
            yield members[start : start + size]


def draw(
    scheduler: Any,
    unet: Any,
    vae: Any,
    batch: list[Drawing],
    conditioning: dict[str | None, Conditioning],
) -> torch.Tensor:
    """Pictures [N, 3, H, W] in 0..1 of drawings of one kind."""
    width, height, num_steps, guidance_scale = batch[0].kind
    generators = [torch.Generator("cpu").manual_seed(one.seed) for one in batch]
    shape = (unet.config.in_channels, height // 8, width // 8)
    latents = sample_latents(
        unet,
        copy.deepcopy(scheduler),
        Conditioning.cat(conditioning[one.prompt] for one in batch),
        Conditioning.cat(conditioning[one.negative] for one in batch),
        noise=starting_noise(generators, shape),
        time_ids=default_time_ids(len(batch), width, height),
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        generators=generators,
    )
    return decode_latents(vae, latents)


def _save(path: Path, picture: torch.Tensor, drawing: Drawing, weights: dict[str, Any]) -> None:
    pixels = (picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", _parameters(drawing, weights))
    info.add_text(SETTINGS_KEY, json.dumps(_record(drawing, weights)))
    partial = path.with_suffix(".partial")
    Image.fromarray(pixels).save(partial, format="PNG", pnginfo=info)
    os.replace(partial, path)


def _parameters(drawing: Drawing, weights: dict[str, Any]) -> str:
    """The line that web UIs show and read."""
    negative = f"\nNegative prompt: {drawing.negative}" if drawing.negative else ""
    return (
        f"{drawing.prompt}{negative}\nSteps: {drawing.num_steps}, Sampler: {weights['sampler']}, "
        f"CFG scale: {drawing.guidance_scale}, Seed: {drawing.seed}, "
        f"Size: {drawing.width}x{drawing.height}"
    )


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, path)
