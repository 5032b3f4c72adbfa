"""The two outputs of a sample, encoded: images to latents, captions to embeddings.

Batches are always filled to one fixed size: the last bits of an encoder's output depend on the
batch size, but not on who else is in the batch. So they may run across samples.
"""

import errno
import functools
import hashlib
import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from precompute.encoders import Encoders
from precompute.images.decode import limit_large_images, open_picture
from precompute.images.masks import Gray, open_alpha, open_mask, render_mask, shows_anything
from precompute.images.rejections import explain
from precompute.images.variants import render_variants
from precompute.plan.placement import PlannedSample, picture_mark
from precompute.settings import EncodeSettings
from runtime.devices import DTYPES, num_cores
from runtime.files import content_digest
from runtime.workers import rank_info
from sdxl.latent_rgb import LatentSums
from shards.reader import read_ahead

# Errors that are of one file; others (of a disk, of a network) end the run, and it goes on later.
OF_THE_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP}
R = TypeVar("R")
S = TypeVar("S")
# A variant: its image [3, H, W] in -1..1, its mask [1, h, w] in 0..1, empty if it has none, and its
# sizes [6].
Pixels = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class EncodedPart:
    """The tensors of one half, as they are stored, and what its sample's JSON notes of it."""

    tensors: dict[str, torch.Tensor]
    notes: dict[str, Any]
    made_with: list[dict[str, Any]]  # batch sizes and the like: they decide last bits
    digests: dict[str, str]  # sha256 of what it was made from: "picture", "mask"; "captions"
    sums: tuple[LatentSums, ...] = ()  # of latents that were encoded, by variant


@dataclass(frozen=True)
class Failed:
    """Why a sample has no such half; for good, or until the next run."""

    reason: str
    is_permanent: bool = True
    is_hidden: bool = False  # a mask hides all of its variants
    digests: dict[str, str] = field(
        default_factory=dict
    )  # as of a ``EncodedPart``, where it was read


@dataclass(frozen=True, eq=False)
class _Opened:
    """The variants of an image, or why there are none."""

    rows: list[Pixels] | Failed
    digests: dict[str, str]


def encode_latents(
    members: Sequence[PlannedSample], encoders: Encoders
) -> Iterator[EncodedPart | Failed]:
    """Of each image its latents with their sizes: all variants of an image are one half.

    Its variants are those planned, less those that a mask hides all over.

    Raises:
        OSError: a file cannot be read now. That is no property of the image: the run ends, and
            goes on from there the next time.
    """
    size, threads = encoders.batch_size, max(1, num_cores() // rank_info().local_size)
    # Each variant is an image in memory.
    most = max((len(member.variants) for member in members), default=1)
    opened = read_ahead(
        lambda member: _open_member(member, encoders.settings),
        members,
        threads,
        -(-(2 * size + threads) // most),
    )
    digests: deque[dict[str, str]] = deque()

    def rows() -> Iterator[list[Pixels] | Failed]:
        for image in opened:
            digests.append(image.digests)
            yield image.rows

    def encode(rows: list[Pixels]) -> list[tuple[torch.Tensor, ...]]:
        images, masks, sizes = zip(*rows, strict=True)
        posterior = encoders.latents.encode(torch.stack(images))
        return [*zip(posterior.mean, posterior.std, images, masks, sizes, strict=True)]

    for planned, encoded in zip(members, in_batches(rows(), encode, size), strict=True):
        made_from = digests.popleft()
        if isinstance(encoded, Failed):
            yield replace(encoded, digests=made_from)
            continue
        parts = [torch.stack(part) for part in zip(*encoded, strict=True)]
        mean, std, images, mask, sizes = parts
        tensors = {"latents.mean": mean, "latents.std": std}
        if mask.numel():
            tensors["mask"] = mask
        if encoders.settings.mean_only:
            del tensors["latents.std"]
        sums = [*map(_sums_of, mean, images)]
        notes = _notes(sums, len(planned.variants) - len(encoded))
        half = _stored(tensors, notes, encoders, made_from)
        if isinstance(half, EncodedPart):
            half.tensors["sizes"] = sizes
            half = replace(half, sums=tuple(sums))
        yield half


def _sums_of(mean: torch.Tensor, image: torch.Tensor) -> LatentSums:
    sums = LatentSums.empty(len(mean))
    sums.add(mean.unsqueeze(0), image.unsqueeze(0))
    return sums


def _notes(sums: Sequence[LatentSums], num_dropped: int) -> dict[str, Any]:
    notes: dict[str, Any] = {"sums": _total(sums).to_json()}
    return notes | {"num_dropped_variants": num_dropped} if num_dropped else notes


def _total(sums: Sequence[LatentSums]) -> LatentSums:
    """Added one after the other, so that variants which join later give the same bits."""
    return functools.reduce(operator.add, sums)


def joined(first: EncodedPart, others: EncodedPart) -> EncodedPart:
    """Latents of a sample's first variants, which lay there, and of its others, just encoded."""
    tensors = {
        name: torch.cat([tensor, others.tensors[name]]) for name, tensor in first.tensors.items()
    }
    sums = [LatentSums.from_json(first.notes["sums"]), *others.sums]
    num_dropped = sum(half.notes.get("num_dropped_variants", 0) for half in (first, others))
    made_with = [
        *first.made_with,
        *(run_settings for run_settings in others.made_with if run_settings not in first.made_with),
    ]
    return EncodedPart(tensors, _notes(sums, num_dropped), made_with, others.digests)


def encode_texts(
    members: Sequence[PlannedSample], encoders: Encoders
) -> Iterator[EncodedPart | Failed]:
    """Of each sample the embeddings of all its captions."""

    def encode(rows: list[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        conditioning = encoders.text.encode(rows, encoders.batch_size)
        return [*zip(conditioning.prompt, conditioning.pooled, strict=True)]

    captions = (planned.record.captions for planned in members)
    for planned, encoded in zip(
        members, in_batches(captions, encode, encoders.batch_size), strict=True
    ):
        assert not isinstance(encoded, Failed)
        prompt, pooled = (torch.stack(parts) for parts in zip(*encoded, strict=True))
        tensors = {"prompt_embeds": prompt, "pooled_prompt_embeds": pooled}
        num_cut = sum(map(encoders.text.is_cut, planned.record.captions))
        captions_digest = content_digest(list(planned.record.captions))
        yield _stored(
            tensors, {"num_cut_captions": num_cut}, encoders, {"captions": captions_digest}
        )


def in_batches(
    groups: Iterable[Sequence[R] | Failed], encode: Callable[[list[R]], list[S]], size: int
) -> Iterator[list[S] | Failed]:
    """Encode the rows of each group, ``size`` at a time, whichever groups they are of."""
    waiting: deque[Sequence[R] | Failed] = deque()
    rows: list[R] = []
    done: list[S] = []

    def finished() -> Iterator[list[S] | Failed]:
        while waiting and (isinstance(waiting[0], Failed) or len(waiting[0]) <= len(done)):
            group = waiting.popleft()
            if isinstance(group, Failed):
                yield group
            else:
                yield done[: len(group)]
                del done[: len(group)]

    for group in groups:
        waiting.append(group)
        if not isinstance(group, Failed):
            rows.extend(group)
        while len(rows) >= size:
            done += encode(rows[:size])
            del rows[:size]
        yield from finished()
    if rows:
        done += encode(rows)
    yield from finished()


def _stored(
    tensors: dict[str, torch.Tensor],
    notes: dict[str, Any],
    encoders: Encoders,
    digests: dict[str, str],
) -> EncodedPart | Failed:
    """In the dtype of the cache, if that can hold it."""
    dtype = encoders.settings.dtype
    cast = {name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}
    for name, tensor in cast.items():
        if not tensor.isfinite().all():
            return Failed(f"its {name} is not finite in {dtype}", digests=digests)
    return EncodedPart(cast, notes, [encoders.made_with], digests)


def _open_member(planned: PlannedSample, settings: EncodeSettings) -> _Opened:
    """Of each variant its pixels, mask and sizes, or why there are none."""
    record = planned.record
    try:
        data = record.picture.read()
        mask = None if record.mask is None else record.mask.read()
    except ValueError as error:  # it changed
        return _Opened(Failed(str(error), is_permanent=False), {})
    except OSError as error:
        if error.errno not in OF_THE_FILE:
            raise
        failed = Failed(f"while the dataset was encoded: {explain(error)}", is_permanent=False)
        return _Opened(failed, {})
    digests = {"picture": hashlib.sha256(data).hexdigest()}
    if mask is not None:
        digests["mask"] = hashlib.sha256(mask).hexdigest()
    marks = [picture_mark(digests.get(name, "")) for name in ("picture", "mask")]
    if [planned.picture or marks[0], planned.mask] != marks:
        failed = Failed(
            "it changed, and its size and time do not show it; encode again with --rehash",
            is_permanent=False,
        )
        return _Opened(failed, {})
    return _Opened(_open_variants(planned, settings, data, mask), digests)


def _open_variants(
    planned: PlannedSample, settings: EncodeSettings, data: bytes, mask: bytes | None
) -> list[Pixels] | Failed:
    """A variant of which the mask shows nothing is dropped: its loss would be zero."""
    try:
        with limit_large_images(planned.variants[0].original):
            images = render_variants(open_picture(data), planned.variants)
    except Exception as error:  # Pillow raises anything of a bad file
        return Failed(explain(error))
    try:
        masks = _open_masks(data, mask, planned, settings)
    except Exception as error:
        return Failed(f"its mask: {explain(error)}")
    sizes = [torch.tensor(variant.sizes, dtype=torch.int32) for variant in planned.variants]
    variants = [*zip(images, masks, sizes, strict=True)]
    if masks.numel():
        variants = [
            variant for variant in variants if shows_anything(variant[1], DTYPES[settings.dtype])
        ]
    return variants or Failed(
        "its mask: all of it is black in the part of the image that is kept; what is white in it "
        "is cropped off",
        is_hidden=True,
    )


def _open_masks(
    data: bytes, mask: bytes | None, planned: PlannedSample, settings: EncodeSettings
) -> torch.Tensor:
    """Of each variant the mask [V, 1, h, w], or nothing [V, 0]."""
    shares: Gray | None = None
    if mask is not None:
        shares = open_mask(mask, planned.variants[0].original)
    elif settings.mask_from_alpha:
        shares = open_alpha(data)
    if shares is None:
        return torch.empty(len(planned.variants), 0)
    return render_mask(shares, planned.variants)
