"""The latents and the text of samples: imported where the plan says so, else encoded."""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from precompute.dataset.records import ImportedFile
from precompute.encode_samples import (
    EncodedPart,
    Failed,
    cast,
    encode_latents,
    encode_texts,
    latent_notes,
    open_member,
    sums_of,
)
from precompute.encoders import Encoders
from precompute.images.masks import shows_anything
from precompute.imports.kohya import true_variants
from precompute.imports.npz import Npz, NpzError
from precompute.plan.placement import PlannedSample
from runtime.devices import num_cores
from runtime.files import content_digest
from runtime.workers import rank_info
from sdxl.sampling import scale_mean
from shards.reader import read_ahead

IMPORTED = "imported"  # the note in a sample's JSON, of its latents or its text: from where
FROM = "kohya"
FACTOR = 8  # pixels per latent pixel
Array = npt.NDArray[np.float32]
Part = EncodedPart | Failed


def make_latents(members: Sequence[PlannedSample], encoders: Encoders) -> Iterator[Part]:
    """The latents, masks and sizes of each sample, as ``encode_latents`` says."""

    def is_imported(planned: PlannedSample) -> bool:
        return planned.latents_file is not None

    return _merged(members, encoders, is_imported, _import_latents, encode_latents)


def make_texts(members: Sequence[PlannedSample], encoders: Encoders) -> Iterator[Part]:
    """The embeddings of all captions of each sample."""

    def is_imported(planned: PlannedSample) -> bool:
        return planned.text_file is not None

    return _merged(members, encoders, is_imported, _import_text, encode_texts)


def _merged(
    members: Sequence[PlannedSample],
    encoders: Encoders,
    is_imported: Callable[[PlannedSample], bool],
    import_part: Callable[[PlannedSample, Encoders], Part],
    encode: Callable[[Sequence[PlannedSample], Encoders], Iterator[Part]],
) -> Iterator[Part]:
    """The parts in order; files are read ahead by threads while the others are encoded."""
    threads = max(1, num_cores() // rank_info().local_size)
    imported = iter(
        read_ahead(
            lambda planned: import_part(planned, encoders),
            filter(is_imported, members),
            threads,
            2 * threads,
        )
    )
    encoded = encode([planned for planned in members if not is_imported(planned)], encoders)
    for planned in members:
        yield next(imported if is_imported(planned) else encoded)


def _import_latents(planned: PlannedSample, encoders: Encoders) -> Part:
    """The stored sample of the posterior is taken as its mean: there is no std.

    The image is opened too: its digest is noted, and its colors, of which previews are made.
    """
    assert planned.latents_file is not None
    where = true_variants(planned.variants)
    settings = replace(encoders.settings, mask_from_alpha=False)  # the file has the mask
    opened = open_member(replace(planned, variants=where), settings)
    if isinstance(opened.rows, Failed):
        return replace(opened.rows, digests=opened.digests)

    def read(npz: Npz, suffix: str) -> dict[str, torch.Tensor]:
        names = ["latents", "latents_flipped"][: len(planned.variants)]
        stacked = np.stack([_floats(npz, name + suffix) for name in names])
        tensors = {"latents.mean": torch.from_numpy(stacked)}
        if (name := "alpha_mask" + suffix) in npz:
            tensors |= _masks(_floats(npz, name), planned)
        return tensors

    tensors = _read(planned.latents_file, read)
    if isinstance(tensors, Failed):
        return replace(tensors, digests=opened.digests)
    mean = scale_mean(encoders.base.vae.config, tensors["latents.mean"])
    colors = torch.stack([row.colors for row in opened.rows])
    sums = [*map(sums_of, mean, colors)]
    part = cast(tensors | {"latents.mean": mean}, latent_notes(sums, 0), encoders, opened.digests)
    if isinstance(part, Failed):
        return part
    mask = part.tensors.get("mask")
    if mask is not None and not all(shows_anything(side, mask.dtype) for side in mask):
        reason = "its mask: the alpha mask of the imported file is black all over"
        return Failed(reason, is_hidden=True, digests=opened.digests)
    part.tensors["sizes"] = torch.tensor(
        [variant.sizes for variant in planned.variants], dtype=torch.int32
    )
    return _marked(replace(part, sums=tuple(sums)))


def _masks(alpha: Array, planned: PlannedSample) -> dict[str, torch.Tensor]:
    """The mean of the alpha over each latent pixel: [V, 1, h, w]; none where all of it is opaque.

    Raises:
        NpzError: it is not in 0..1.
    """
    if not (alpha >= 0).all() or not (alpha <= 1).all():  # nan is neither
        raise NpzError("has an alpha_mask that is not in 0..1")
    if (alpha == 1).all():
        return {}
    sides = [alpha[:, ::-1] if variant.flipped else alpha for variant in planned.variants]
    height, width = (side // FACTOR for side in alpha.shape)
    cells = np.stack(sides).reshape(len(sides), 1, height, FACTOR, width, FACTOR)
    return {"mask": torch.from_numpy(cells.mean(axis=(3, 5), dtype=np.float64)).float()}


def _import_text(planned: PlannedSample, encoders: Encoders) -> Part:
    """The embeddings of both text encoders, joined as the UNet takes them."""
    assert planned.text_file is not None

    def read(npz: Npz, suffix: str) -> dict[str, torch.Tensor]:
        prompt = np.concatenate([_floats(npz, f"hidden_state{n}") for n in (1, 2)], axis=1)
        pooled = _floats(npz, "pool2")
        return {
            "prompt_embeds": torch.from_numpy(prompt)[None],
            "pooled_prompt_embeds": torch.from_numpy(pooled)[None],
        }

    digests = {"captions": content_digest(list(planned.record.captions))}
    tensors = _read(planned.text_file, read)
    if isinstance(tensors, Failed):
        return tensors
    part = cast(tensors, {"num_cut_captions": 0}, encoders, digests)
    return part if isinstance(part, Failed) else _marked(part)


def _marked(part: EncodedPart) -> EncodedPart:
    """Noted as imported, and made with no settings of ours."""
    return replace(part, notes=part.notes | {IMPORTED: FROM}, made_with=[])


def _read(
    file: ImportedFile, read: Callable[[Npz, str], dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor] | Failed:
    """What ``read`` makes of the file, or why it cannot be used: for good, or only now.

    Raises:
        OSError: the disk fails.
    """
    name = file.blob.file.name
    try:
        data = file.blob.read()
    except ValueError as error:  # gone, or changed since
        return Failed(f"{name}: {error}", is_permanent=False)
    try:
        npz = Npz(io.BytesIO(data))
        if npz.digest != file.digest:
            return Failed(f"{name}: it changed, and its size and time do not show it", False)
        return read(npz, file.suffix)
    except NpzError as error:
        return Failed(f"{name} {error}")


def _floats(npz: Npz, name: str) -> Array:
    """An array in fp32.

    Raises:
        NpzError: it is damaged, or a number in it is not finite.
    """
    array: Any = npz.array(name)
    with np.errstate(over="ignore", invalid="ignore"):
        numbers = np.array(array, dtype=np.float32, order="C")
    if not np.isfinite(numbers).all():
        raise NpzError(f"has {name} with numbers that are not finite")
    return numbers
