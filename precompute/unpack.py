"""Turns a cache back into a folder of previews and captions, which ``encode`` reads again.

Each image gets its path in the dataset back, so that it has the same key; a path that could leave
the folder, or that encode would not read, is replaced by ``unnamed/KEY.png``. Samples come from
whoever made the cache: no path of theirs is believed.
"""

import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from precompute.dataset.captions import MAX_TEXT_BYTES, decode_text
from precompute.dataset.file_roles import has_ending, is_hidden, is_image, stem_of
from runtime.devices import pick_device
from runtime.files import is_inside, seal, unseal, write_durable
from sdxl.base import open_vae
from sdxl.latent_rgb import latents_to_rgb
from sdxl.load import load_vae
from sdxl.sampling import unscale
from shards.format import CacheError
from shards.reader import Cache, Shard

STATE = "unpacking.json"  # while it lasts: of which cache and with which VAE
LIST = "unpacked.jsonl"  # written last; no list that encode reads
BATCH_SIZE = 4
FACTOR = 8  # image pixels per latent pixel
MAX_PATH_BYTES, MAX_NAME_BYTES = 2000, 200
JPEG_ENDINGS = (".jpg", ".jpeg", ".jfif")
BAD_CHARACTERS = '\\:*?"<>|'
SIZES = (
    *("original_height", "original_width"),
    *("crop_top", "crop_left"),
    *("target_height", "target_width"),
)


@dataclass(frozen=True)
class UnpackedSample:
    """A sample of a cache, and the file that its preview is written to."""

    shard: Shard
    row: int
    key: str
    fields: dict[str, Any]  # its JSON
    file: str  # relative posix path
    shares_stem: bool  # with another image, so that a caption needs the image's whole name

    @property
    def text_stem(self) -> str:
        return self.file if self.shares_stem else stem_of(self.file)


def unpack(
    folder: Path, out: Path, vae: str | None = None, device: str = "auto"
) -> Iterator[tuple[int, int]]:
    """Write previews, captions and masks of a cache into ``out``; yields how many samples are done,
    and of how many, after each batch. Where it was interrupted, it goes on.

    Previews come from the linear map of the cache, or with ``vae`` from its decoder.

    Raises:
        ValueError: ``out`` has anything else in it; the VAE cannot be used.
        CacheError: the cache is damaged, or has no linear map.
        OSError: a file cannot be written.
    """
    cache = Cache(folder)
    state = {"cache": cache.data_digest, "vae": vae}
    _check_out(out, folder, state)
    draw = _Decoder(vae, device) if vae else _LinearColors(cache)
    samples = list_samples(cache)
    out.mkdir(parents=True, exist_ok=True)
    write_durable(out / STATE, json.dumps(seal(state)).encode())
    missing = [sample for sample in samples if not (out / sample.file).exists()]
    done = len(samples) - len(missing)
    yield done, len(samples)
    for batch in _batches(missing):
        for sample, image in zip(batch, draw(_latents(batch)), strict=True):
            _write_sample(out, sample, image)
        done += len(batch)
        yield done, len(samples)
    lines = (json.dumps(_entry(sample)) + "\n" for sample in samples)
    write_durable(out / LIST, "".join(lines).encode())
    (out / STATE).unlink()


def _check_out(out: Path, cache: Path, state: dict[str, Any]) -> None:
    if is_inside(out, cache) or is_inside(cache, out):
        raise ValueError(f"--out {out}: is the cache, or one lies in the other; give another --out")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: not a folder")
    if not out.exists() or not any(out.iterdir()):
        return
    try:
        before = unseal((out / STATE).read_bytes())
    except (OSError, ValueError):
        raise ValueError(f"--out {out}: not empty; give another --out") from None
    if {name: before.get(name) for name in state} != state:
        raise ValueError(
            f"--out {out}: another cache is being unpacked there, or with another --vae; give "
            "another --out"
        )


def list_samples(cache: Cache) -> list[UnpackedSample]:
    """All samples of a cache with the files that they will have, which are all different."""
    rows = [
        (shard, row, shard.index.key(row), shard.metadata(row))
        for shard in cache.shards()
        for row in range(len(shard.index))
    ]
    files = [
        fields["path"] if is_safe(fields["path"]) else f"unnamed/{key}.png"
        for _, _, key, fields in rows
    ]
    folders = {
        folder.lower()
        for file in files
        for folder in (file[:at] for at, letter in enumerate(file) if letter == "/")
    }
    taken = Counter(map(str.lower, files))
    for number, (_, _, key, _) in enumerate(rows):
        lower = files[number].lower()
        if taken[lower] > 1 or lower in folders:  # also where letter case makes no difference
            files[number] = f"unnamed/{key}.png"
    stems = Counter(stem_of(file).lower() for file in files)
    return [
        UnpackedSample(*row, file, stems[stem_of(file).lower()] > 1)
        for row, file in zip(rows, files, strict=True)
    ]


def is_safe(path: str) -> bool:
    """Whether a path stays in its folder on any system, and is one that encode reads."""
    parts = path.split("/")
    try:
        names = [part.encode() for part in parts]
    except UnicodeEncodeError:
        return False
    return (
        all(0 < len(name) <= MAX_NAME_BYTES for name in names)
        and len(path.encode()) <= MAX_PATH_BYTES
        and not any(is_hidden(part) or part[-1] in ". " for part in parts)
        and not any(letter < " " or letter in BAD_CHARACTERS for letter in path)
        and (is_image(parts[-1]) or not has_ending(path))
        and parts[0].lower() != "unnamed"
    )


class _LinearColors:
    """Latents to images by the cache's own map, a color for each latent pixel."""

    def __init__(self, cache: Cache) -> None:
        if "latent_rgb" not in cache.manifest:
            raise CacheError(f"{cache.folder}: its manifest has no latent_rgb map; give --vae")
        fit = cache.manifest["latent_rgb"]
        self._weight, self._bias = torch.tensor(fit["weight"]), torch.tensor(fit["bias"])

    def __call__(self, latents: torch.Tensor) -> list[Image.Image]:
        images = map(_to_image, latents_to_rgb(latents, self._weight, self._bias))
        size = (latents.shape[3] * FACTOR, latents.shape[2] * FACTOR)
        return [image.resize(size, Image.Resampling.BICUBIC) for image in images]


class _Decoder:
    """Latents to images by a VAE."""

    def __init__(self, vae: str, device: str) -> None:
        self._vae: Any = load_vae(open_vae(vae), torch.float32).to(pick_device(device))

    @torch.inference_mode()
    def __call__(self, latents: torch.Tensor) -> list[Image.Image]:
        channels = self._vae.config.latent_channels
        if latents.shape[1] != channels:
            raise ValueError(f"--vae has {channels} channels, the cache {latents.shape[1]}")
        plain = unscale(self._vae.config, latents.to(self._vae.device))
        decoded = self._vae.decode(plain).sample.float().cpu()
        return [*map(_to_image, (decoded / 2 + 0.5).clamp(0, 1))]


def _to_image(colors: torch.Tensor) -> Image.Image:
    """[3, h, w] in 0..1."""
    pixels = (colors.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    return Image.fromarray(np.ascontiguousarray(pixels))


def _batches(samples: Iterable[UnpackedSample]) -> Iterator[list[UnpackedSample]]:
    """Up to BATCH_SIZE samples of one shape each, in order."""
    batch: list[UnpackedSample] = []
    for sample in samples:
        if batch and (len(batch) == BATCH_SIZE or _shape(batch[0]) != _shape(sample)):
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch


def _shape(sample: UnpackedSample) -> tuple[int, int, int]:
    return sample.shard.index.layout.latent


def _latents(batch: Sequence[UnpackedSample]) -> torch.Tensor:
    """The latents of each first variant: [N, C, h, w] fp32."""
    latents = torch.empty(len(batch), *_shape(batch[0]))
    for target, sample in zip(latents, batch, strict=True):
        sample.shard.read_into(target, sample.row, "latents.mean")
    return latents


def _write_sample(out: Path, sample: UnpackedSample, image: Image.Image) -> None:
    """Write captions and mask, and then the image, which marks the sample as done."""
    path = out / sample.file
    path.parent.mkdir(parents=True, exist_ok=True)
    ending, data = _caption_file(sample)
    write_durable(out / f"{sample.text_stem}{ending}", data)
    index = sample.shard.index
    if "mask" in index.sample_layout(index.record(sample.row)).tensors and not sample.shares_stem:
        mask = torch.empty(index.layout.shape("mask"))
        sample.shard.read_into(mask, sample.row, "mask")
        gray = (mask[0].clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        drawn = Image.fromarray(gray).resize(image.size, Image.Resampling.NEAREST)
        write_durable(out / f"{stem_of(sample.file)}.mask.png", _to_bytes(drawn, ".png"))
    write_durable(path, _to_bytes(image, path.suffix))


def _caption_file(sample: UnpackedSample) -> tuple[str, bytes]:
    """The ending and the bytes of the file that encode reads the captions from: a text of one
    caption, a JSON where there are several or a text would read as another one. Of captions with
    roles the JSON has a field for each role, which ``--caption-roles ROLE=ROLE,...`` reads."""
    captions, roles = sample.fields["captions"], sample.fields.get("roles", [])
    if any(roles):
        by_role: dict[str, list[str]] = {}
        for caption, role in zip(captions, roles, strict=True):
            by_role.setdefault(role, []).append(caption)
        return ".json", json.dumps(by_role).encode()
    text = captions[0].encode("utf-8", "backslashreplace")
    if len(captions) == 1 and len(text) <= MAX_TEXT_BYTES:
        try:
            is_same = decode_text(text).strip() == captions[0]
        except ValueError:
            is_same = False
        if is_same:
            return ".txt", text
    return ".json", json.dumps({"caption": captions}).encode()


def _to_bytes(image: Image.Image, ending: str) -> bytes:
    """A JPEG where the name says so, else a PNG, which encode knows by its first bytes."""
    file = io.BytesIO()
    if ending.lower() in JPEG_ENDINGS:
        image.save(file, "JPEG", quality=95)
    else:
        image.save(file, "PNG")
    return file.getvalue()


def _entry(sample: UnpackedSample) -> dict[str, Any]:
    """A line of ``unpacked.jsonl``."""
    index = sample.shard.index
    sizes = []
    for number in range(int(index.records["num_variants"][sample.row])):
        numbers = torch.empty(6, dtype=torch.int32)
        sample.shard.read_into(numbers, sample.row, "sizes", number)
        sizes.append(dict(zip(SIZES, numbers.tolist(), strict=True)))
    return {
        "key": sample.key,
        "file": sample.file,
        "path": sample.fields["path"],
        "captions": sample.fields["captions"],
        **({"roles": sample.fields["roles"]} if sample.fields.get("roles") else {}),
        "weight": sample.fields["weight"],
        "repeats": index.header.get("repeats", 1),
        "variants": sizes,
        "digests": sample.fields["digests"],
    }
