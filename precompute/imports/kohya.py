"""Finds the caches of kohya's sd-scripts beside the images, and what each sample takes from them.

``x_1200x0900_sdxl.npz`` beside ``x.png`` (its size) holds, before any scaling,

    latents            [4, h, w]   a sample of the VAE's posterior; of the mirrored image too as
    latents_flipped                ``latents_flipped``
    original_size      [2]         width, height
    crop_ltrb          [4]         left, top, right, bottom: pixels of the bucket
    alpha_mask         [8h, 8w]    0..1

each name ending in ``_HxW``, the size of the latents, where a file holds several sizes; older
versions named it ``x.npz``. ``x_te_outputs.npz`` holds ``hidden_state1`` [T, 768],
``hidden_state2`` [T, 1280] and ``pool2`` [1280], of one caption. T is 77; with longer captions it
is 75n + 2, which cannot be taken, since the ends of the n chunks are not in it.

(sd-scripts, library/strategy_base.py and library/strategy_sdxl.py, 2026-02.)
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from precompute.dataset.captions import captions_of_text, decode_text
from precompute.dataset.file_roles import stem_of
from precompute.dataset.records import Blob, ImportedFile, Memory, Rejected
from precompute.imports.npz import Npz, NpzError
from precompute.plan.placement import PlannedSample
from precompute.settings import EncodeSettings
from runtime.files import open_regular
from runtime.messages import pluralize
from sdxl.base import Base
from shards.buckets import Geometry, Size, cover

TEXT_NAME = re.compile(r"(.+)_te_outputs\.npz", re.DOTALL)
LATENTS_NAME = re.compile(r"(.+)_(\d{3,6})x(\d{3,6})_sdxl\.npz", re.DOTALL)
OLD_NAME = re.compile(r"(.+)\.npz", re.DOTALL)  # of SD 1.5 or SDXL: the file does not tell
SIZED = re.compile(r"latents(?:_(\d{1,5})x(\d{1,5}))?")
MIN_AREA = 0.75  # of resolution²: a bucket that is smaller was made at another resolution
MAX_PIXELS = 2**24  # along a side, and of a crop


def cached_stem(name: str) -> str | None:
    """The stem of the image that a file of kohya's belongs to; None for other files."""
    for pattern in (TEXT_NAME, LATENTS_NAME, OLD_NAME):
        if match := pattern.fullmatch(name):
            return match[1]
    return None


@dataclass
class Imports:
    """How many samples of a cache take something from files, and why files were not taken."""

    num_latents: int = 0
    num_texts: int = 0
    num_samples: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def skip(self, reason: str, path: Path) -> None:
        self.skipped[reason] += 1
        self.examples.setdefault(reason, path.name)

    def describe(self) -> Iterator[str]:
        """The lines for the reports of encode and of ``--dry-run``."""
        yield (
            f"  imported from kohya, not checked against the base: latents of "
            f"{self.num_latents:,} and text of {self.num_texts:,} of "
            f"{pluralize(self.num_samples, 'image')}"
        )
        for reason, number in sorted(self.skipped.items()):
            yield f"  not imported ({number:,}): {reason}; e.g. {self.examples[reason]}"


def find_imports(
    planned: list[PlannedSample], settings: EncodeSettings, base: Base, memory: Memory
) -> tuple[list[PlannedSample], list[Rejected], Imports]:
    """The samples with the files that they take latents or text from; those whose file is damaged
    are rejected."""
    imports = Imports(num_samples=len(planned))
    finder = _Finder(settings, base, memory, imports)
    results, rejected = list[PlannedSample](), list[Rejected]()
    for sample in planned:
        try:
            results.append(finder.find(sample))
        except NpzError as error:
            rejected.append(Rejected(sample.record.path, str(error)))
    imports.num_latents = sum(sample.latents_file is not None for sample in results)
    imports.num_texts = sum(sample.text_file is not None for sample in results)
    return results, rejected, imports


class _Finder:
    def __init__(
        self, settings: EncodeSettings, base: Base, memory: Memory, imports: Imports
    ) -> None:
        self._settings, self._memory, self._imports = settings, memory, imports
        text, text_2 = base.text_encoder.config, base.text_encoder_2.config
        self._widths = [text["hidden_size"], text_2["hidden_size"], text_2["projection_dim"]]
        self._channels = int(base.vae.config.get("latent_channels", 4))

    def find(self, sample: PlannedSample) -> PlannedSample:
        """
        Raises:
            NpzError: a file of this image is damaged; the message names it.
        """
        file = sample.record.image.file
        if sample.record.path.rpartition("/")[2] != file.name:
            return sample  # it is in a tar or a table
        latents, texts = _files_by_stem(file.parent).get(stem_of(file.name), ((), ()))
        reasons = []
        for path in latents:
            sample, reason = self._with_latents(sample, path)
            reasons.append((reason, path))
            if sample.latents_file:  # then it matters no more why others were not taken
                reasons = [(reason, path)]
                break
        for path in texts:
            sample, reason = self._with_text(sample, path)
            reasons.append((reason, path))
        for reason, path in reasons:
            if reason:
                self._imports.skip(reason, path)
        return sample

    def _with_latents(self, sample: PlannedSample, path: Path) -> tuple[PlannedSample, str]:
        """The sample with latents of the file, and what was not taken, and why."""
        contents = self._read(path, read_latents_header)
        original = sample.variants[0].original
        sizes = [
            size
            for size in contents["sizes"]
            if _is_of_resolution(size["latent"], self._settings.resolution)
        ]
        if not sizes:
            return sample, "made at another resolution"
        width, height = sample.bucket
        sizes.sort(key=lambda size: (size["latent"] != [height // 8, width // 8], size["latent"]))
        size = sizes[0]
        if size["channels"] != self._channels:
            raise NpzError(f"{path.name} has {size['channels']} channels, not {self._channels}")
        wants_mask = self._settings.mask_from_alpha
        for is_missing, reason in (
            (tuple(size["original"]) != original, "of an image of another size"),
            (
                sample.record.mask is not None,
                "the image has a mask file, not fitted to this crop",
            ),
            (wants_mask and not size["has_mask"], "without an alpha mask"),
            (self._settings.flip and not size["is_flipped"], "without mirrored latents (--flip)"),
        ):
            if is_missing:
                return sample, reason
        if self._settings.flip and size["crop"][2] > 8 * size["latent"][1]:
            raise NpzError(f"{path.name} has a crop that ends beyond its bucket: {size['crop']}")
        is_left = not self._settings.flip and size["is_flipped"]
        file = ImportedFile(contents["blob"], contents["digest"], size["suffix"])
        variants = _variants(original, size, self._settings.flip)
        imported = replace(sample, variants=variants, latents_file=file)
        return imported, "mirrored latents; --flip takes them" if is_left else ""

    def _with_text(self, sample: PlannedSample, path: Path) -> tuple[PlannedSample, str]:
        contents = self._read(path, read_text_header)
        if contents["widths"] != self._widths:
            raise NpzError(
                f"{path.name} has embeddings of widths {contents['widths']}, where the base's text "
                f"encoders make {self._widths}"
            )
        wanted = 77 * self._settings.long_captions
        is_varied = self._settings.shuffle_tags or self._settings.wildcards
        if contents["tokens"] != wanted:
            return sample, f"{contents['tokens']} tokens of text, not {wanted}"
        if len(sample.record.captions) != 1 or is_varied:
            return sample, "text of one caption, where the image has several or a varied one"
        text = self._text_beside(sample.record.image.file)
        if text is None or self._captions_in(text) != sample.record.captions:
            return sample, "text of the file beside the image, where the caption is another one"
        if text.stat().st_mtime_ns > contents["blob"].mtime_ns:
            return sample, "text of a caption that was changed since"
        file = ImportedFile(contents["blob"], contents["digest"])
        return replace(sample, text_file=file), ""

    def _text_beside(self, image: Path) -> Path | None:
        """The text beside the image, of which kohya's embeddings are: the file does not hold it."""
        stem = stem_of(image.name)
        paths = [image.with_name(stem + ending) for ending in self._settings.texts]
        return next((path for path in paths if path.is_file()), None)

    def _captions_in(self, text: Path) -> tuple[str, ...]:
        """The captions of a text, or none where it cannot be read. Those of lists, with a prefix or
        from elsewhere are others."""
        try:
            return captions_of_text(decode_text(Blob.of(text).read()), self._settings)
        except (OSError, ValueError):
            return ()

    def _read(self, path: Path, read: Any) -> dict[str, Any]:
        """What ``read`` finds in a file, its digest and the blob; remembered if unchanged.

        Raises:
            NpzError: it cannot be used; the message begins with its name.
        """
        try:
            blob = Blob.of(path)

            def read_file() -> dict[str, Any]:
                with open_regular(path) as file:
                    npz = Npz(file)
                    return {"digest": npz.digest, **read(npz)}

            try:
                inside = os.path.relpath(path, self._settings.dataset)
                stamp = (f"import {inside}", blob.size, blob.mtime_ns)
                return {**self._memory.recall(*stamp, read_file), "blob": blob}
            except NpzError as error:
                raise NpzError(f"{path.name} {error}") from None
        except NpzError:
            raise
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise NpzError(f"{path.name} cannot be read: {why}") from None


@lru_cache(maxsize=64)  # files of a folder come one after the other
def _scan(folder: Path, mtime_ns: int) -> dict[str, tuple[list[Path], list[Path]]]:
    files: dict[str, tuple[list[Path], list[Path]]] = {}
    for name in sorted(os.listdir(folder)):
        for is_text, pattern in ((1, TEXT_NAME), (0, LATENTS_NAME), (0, OLD_NAME)):
            if match := pattern.fullmatch(name):
                files.setdefault(match[1], ([], []))[is_text].append(folder / name)
                break
    return files


def _files_by_stem(folder: Path) -> dict[str, tuple[list[Path], list[Path]]]:
    """The files with latents, and those with text, of each image of a folder, by its stem."""
    try:
        return _scan(folder, folder.stat().st_mtime_ns)
    except OSError:
        return {}


def _is_of_resolution(latent: list[int], resolution: int) -> bool:
    """Whether latents [h, w] are of a bucket for this resolution."""
    area = 64 * latent[0] * latent[1]
    return MIN_AREA * resolution**2 <= area <= resolution**2


def _variants(original: Size, size: dict[str, Any], flip: bool) -> tuple[Geometry, ...]:
    """The image, and mirrored, as kohya counts their crops: it subtracts the right edge from the
    width of the bucket."""
    height, width = (8 * side for side in size["latent"])
    left, top, right, _ = size["crop"]
    center = replace(cover(original, (width, height)), crop=(left, top))
    mirrored = replace(center, crop=(width - right, top), flipped=True)
    return (center, mirrored) if flip else (center,)


def true_variants(variants: Iterable[Geometry]) -> tuple[Geometry, ...]:
    """Where kohya really cuts, which are not the crops that it stores: from the middle."""
    geometries = []
    for variant in variants:
        center = cover(variant.original, variant.target)
        geometries.append(center.mirrored() if variant.flipped else center)
    return tuple(geometries)


def read_latents_header(npz: Npz) -> dict[str, Any]:
    """The ``sizes`` of latents in a file, without reading them: JSON.

    Raises:
        NpzError: there are none, or they are no cache of SDXL.
    """
    sizes = []
    for name in npz.names:
        if (match := SIZED.fullmatch(name)) is None:
            continue
        suffix = name.removeprefix("latents")
        header = npz.header(name)
        shape = header.shape
        if len(shape) != 3 or header.dtype.kind != "f" or not all(1 <= n <= 2048 for n in shape):
            raise NpzError(f"has {name} of shape {[*shape]} and type {header.dtype}: no latents")
        if match[1] and (int(match[1]), int(match[2])) != shape[1:]:
            raise NpzError(f"has {name} of another size: {shape[1]}x{shape[2]}")
        flipped, mask = "latents_flipped" + suffix, "alpha_mask" + suffix
        if flipped in npz and npz.header(flipped).shape != shape:
            raise NpzError(f"has {flipped} of another shape than {name}")
        pixels = (8 * shape[1], 8 * shape[2])
        if mask in npz and npz.header(mask).shape != pixels:
            raise NpzError(f"has {mask} of another shape than the bucket: {pixels}")
        sizes.append(
            {
                "suffix": suffix,
                "channels": shape[0],
                "latent": [*shape[1:]],
                "original": _integers(npz, "original_size" + suffix, 2),
                "crop": _integers(npz, "crop_ltrb" + suffix, 4),
                "is_flipped": flipped in npz,
                "has_mask": mask in npz,
            }
        )
    if not sizes:
        raise NpzError(f"has no latents (its arrays: {', '.join(npz.names[:9]) or 'none'})")
    return {"sizes": sizes}


def read_text_header(npz: Npz) -> dict[str, Any]:
    """The number of ``tokens`` and the ``widths`` of the embeddings in a file: JSON.

    Raises:
        NpzError: they are no embeddings of SDXL's two text encoders.
    """
    names = ("hidden_state1", "hidden_state2", "pool2")
    first, second, pooled = (npz.header(name) for name in names)
    shapes = [first.shape, second.shape, pooled.shape]
    is_float = all(header.dtype.kind == "f" for header in (first, second, pooled))
    if not is_float or [*map(len, shapes)] != [2, 2, 1] or shapes[0][0] != shapes[1][0]:
        listed = ", ".join(f"{name} {[*shape]}" for name, shape in zip(names, shapes, strict=True))
        raise NpzError(f"has no embeddings of a caption: {listed}")
    return {"tokens": shapes[0][0], "widths": [shape[-1] for shape in shapes]}


def _integers(npz: Npz, name: str, count: int) -> list[int]:
    """Small numbers, rounded: kohya's crops may be fractions of a pixel."""
    if npz.header(name).shape != (count,):
        raise NpzError(f"has {name} of shape {[*npz.header(name).shape]}, not [{count}]")
    numbers = npz.array(name).astype(np.float64)
    if not (np.isfinite(numbers).all() and (abs(numbers) < MAX_PIXELS).all()):
        raise NpzError(f"has {name} that are no pixels")
    rounded = [round(number) for number in numbers.tolist()]
    if min(rounded) < 0:
        raise NpzError(f"has {name} below 0")
    return rounded
