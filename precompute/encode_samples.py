"""Encodes the two parts of samples: images to latents, captions to embeddings.

Batches are always filled to one fixed size: the last bits of an encoder's output depend on the
batch size, but not on what else is in the batch. So they may run across samples.
"""

import errno
import functools
import hashlib
import operator
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch

from precompute.dataset.records import short_digest
from precompute.encoders import Encoders
from precompute.images.decode import limit_large_images, open_image
from precompute.images.masks import Gray, open_alpha, open_mask, render_mask, shows_anything
from precompute.images.rejections import explain
from precompute.images.variants import normalize, render_variants
from precompute.plan.placement import PlannedSample
from precompute.settings import EncodeSettings
from runtime.devices import DTYPES, num_cores
from runtime.files import content_digest
from runtime.workers import rank_info
from sdxl.latent_rgb import LatentSums, mean_colors
from shards.reader import read_ahead

# Errors of one file. Others (of a disk, of a network) end the run, and the next one resumes.
FILE_ERRNOS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP}
R = TypeVar("R")
S = TypeVar("S")


class Pixels(NamedTuple):
    """A variant of an image, rendered."""

    image: torch.Tensor  # [3, H, W] uint8
    colors: torch.Tensor  # [3, h, w] fp32: the mean color of each latent pixel
    mask: torch.Tensor  # [1, h, w] in 0..1; empty if it has none
    sizes: torch.Tensor  # [6]


@dataclass(frozen=True, eq=False)
class EncodedPart:
    """A sample's latents or text: the tensors as they are stored, and the notes for its JSON."""

    tensors: dict[str, torch.Tensor]
    notes: dict[str, Any]
    made_with: list[dict[str, Any]]  # batch sizes and the like: they decide last bits
    digests: dict[str, str]  # sha256 of its inputs: "picture", "mask"; "captions"
    sums: tuple[LatentSums, ...] = ()  # of latents that were encoded, by variant


@dataclass(frozen=True)
class Failed:
    """Why a sample has no latents or text: permanently, or until the next run."""

    reason: str
    is_permanent: bool = True
    is_hidden: bool = False  # whether a mask hides all of its variants
    # as in EncodedPart, if the files were read
    digests: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Opened:
    """The variants of an image, or why there are none."""

    rows: list[Pixels] | Failed
    digests: dict[str, str]


def encode_latents(
    members: Sequence[PlannedSample], encoders: Encoders
) -> Iterator[EncodedPart | Failed]:
    """The latents, masks and sizes of each image, for all of its planned variants but those that a
    mask hides completely.

    Raises:
        OSError: a file cannot be read now. That says nothing of the image, so the run ends; the
            next one resumes.
    """
    size, threads = encoders.batch_size, max(1, num_cores() // rank_info().local_size)
    # Each variant is an image in memory.
    max_variants = max((len(member.variants) for member in members), default=1)
    opened = read_ahead(
        lambda member: open_member(member, encoders.settings),
        members,
        threads,
        -(-(2 * size + threads) // max_variants),
    )
    digests: deque[dict[str, str]] = deque()

    def rows() -> Iterator[list[Pixels] | Failed]:
        for image in opened:
            digests.append(image.digests)
            yield image.rows

    def start(rows: list[Pixels]) -> Callable[[], list[tuple[torch.Tensor, ...]]]:
        images, *others = zip(*rows, strict=True)
        wait = encoders.latents.start(images)

        def encoded() -> list[tuple[torch.Tensor, ...]]:
            posterior = wait()
            return [*zip(posterior.mean, posterior.std, *others, strict=True)]

        return encoded

    batches = in_batches(rows(), start, size, encoders.num_ahead)
    for planned, encoded in zip(members, batches, strict=True):
        made_from = digests.popleft()
        if isinstance(encoded, Failed):
            yield replace(encoded, digests=made_from)
            continue
        mean, std, colors, mask, sizes = map(torch.stack, zip(*encoded, strict=True))
        tensors = {"latents.mean": mean, "latents.std": std}
        if mask.numel():
            tensors["mask"] = mask
        if encoders.settings.mean_only:
            del tensors["latents.std"]
        sums = [*map(sums_of, mean, colors)]
        notes = latent_notes(sums, len(planned.variants) - len(encoded))
        part = cast(tensors, notes, encoders, made_from)
        if isinstance(part, EncodedPart):
            part.tensors["sizes"] = sizes
            part = replace(part, sums=tuple(sums))
        yield part


def sums_of(mean: torch.Tensor, colors: torch.Tensor) -> LatentSums:
    sums = LatentSums.empty(len(mean))
    sums.add(mean.unsqueeze(0), colors.unsqueeze(0))
    return sums


def latent_notes(sums: Sequence[LatentSums], num_dropped: int) -> dict[str, Any]:
    notes: dict[str, Any] = {"sums": _total(sums).to_json()}
    return notes | {"num_dropped_variants": num_dropped} if num_dropped else notes


def _total(sums: Sequence[LatentSums]) -> LatentSums:
    """Added one after the other, so that variants which join later give the same bits."""
    return functools.reduce(operator.add, sums)


def join_variants(first: EncodedPart, others: EncodedPart) -> EncodedPart:
    """The latents of all variants: the first ones were copied, the others just encoded."""
    tensors = {
        name: torch.cat([tensor, others.tensors[name]]) for name, tensor in first.tensors.items()
    }
    sums = [LatentSums.from_json(first.notes["sums"]), *others.sums]
    num_dropped = sum(part.notes.get("num_dropped_variants", 0) for part in (first, others))
    made_with = [
        *first.made_with,
        *(run_settings for run_settings in others.made_with if run_settings not in first.made_with),
    ]
    return EncodedPart(tensors, latent_notes(sums, num_dropped), made_with, others.digests)


def join_captions(
    captions: Sequence[str],
    stored: tuple[Sequence[str], EncodedPart],
    encoded: tuple[Sequence[str], EncodedPart] | None,
    encoders: Encoders,
) -> EncodedPart:
    """The embeddings of ``captions``, each of which is among the stored or the encoded ones."""
    sources = [stored] if encoded is None else [stored, encoded]
    rows = {
        text: (part, row) for texts, part in reversed(sources) for row, text in enumerate(texts)
    }
    tensors = {
        name: torch.stack([rows[text][0].tensors[name][rows[text][1]] for text in captions])
        for name in stored[1].tensors
    }
    num_cut = sum(part.notes["num_cut_captions"] for _, part in sources)
    if num_cut and (encoded is not None or [*captions] != [*stored[0]]):
        num_cut = sum(map(encoders.text.is_cut, captions))
    made_with = [run for _, part in sources for run in part.made_with]
    digests = {"captions": content_digest(list(captions))}
    return EncodedPart(tensors, {"num_cut_captions": num_cut}, made_with, digests)


def encode_texts(
    members: Sequence[PlannedSample], encoders: Encoders
) -> Iterator[EncodedPart | Failed]:
    """The embeddings of all captions of each sample. A text that several of them have is encoded
    once; it is kept as long as one of them is to come."""
    num_uses = Counter(text for planned in members for text in planned.record.captions)

    def start(rows: list[str]) -> Callable[[], list[tuple[torch.Tensor, torch.Tensor]]]:
        wait = encoders.text.start(rows, encoders.batch_size)

        def encoded() -> list[tuple[torch.Tensor, torch.Tensor]]:
            conditioning = wait()
            return [*zip(conditioning.prompt, conditioning.pooled, strict=True)]

        return encoded

    seen: set[str] = set()
    new = [_not_in(seen, planned.record.captions) for planned in members]
    encoded: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    batches = in_batches(new, start, encoders.batch_size, encoders.num_ahead)
    for planned, texts, rows in zip(members, new, batches, strict=True):
        assert not isinstance(rows, Failed)
        encoded.update(zip(texts, rows, strict=True))
        captions = planned.record.captions
        prompt, pooled = (
            torch.stack(parts) for parts in zip(*map(encoded.__getitem__, captions), strict=True)
        )
        num_uses.subtract(captions)
        for text in {text for text in captions if not num_uses[text]}:
            del encoded[text]
        tensors = {"prompt_embeds": prompt, "pooled_prompt_embeds": pooled}
        num_cut = sum(map(encoders.text.is_cut, planned.record.captions))
        captions_digest = content_digest(list(planned.record.captions))
        yield cast(tensors, {"num_cut_captions": num_cut}, encoders, {"captions": captions_digest})


def _not_in(seen: set[str], texts: Iterable[str]) -> list[str]:
    """Each of ``texts`` that is not in ``seen``, once; it is added there."""
    new = [text for text in dict.fromkeys(texts) if text not in seen]
    seen.update(new)
    return new


def in_batches(
    groups: Iterable[Sequence[R] | Failed],
    start: Callable[[list[R]], Callable[[], list[S]]],
    size: int,
    num_ahead: int = 0,
) -> Iterator[list[S] | Failed]:
    """Encode the rows of all groups in batches of ``size``, which may run across groups; yield the
    results of each group. A Failed passes through.

    ``start`` starts to encode a batch and returns what waits for its results. So many as
    ``num_ahead`` later batches are started before a batch is waited for.
    """
    waiting: deque[Sequence[R] | Failed] = deque()
    rows: list[R] = []
    started: deque[Callable[[], list[S]]] = deque()
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
            started.append(start(rows[:size]))
            del rows[:size]
            if len(started) > num_ahead:
                done += started.popleft()()
        yield from finished()
    if rows:
        started.append(start(rows))
    while started:
        done += started.popleft()()
        yield from finished()
    yield from finished()


def cast(
    tensors: dict[str, torch.Tensor],
    notes: dict[str, Any],
    encoders: Encoders,
    digests: dict[str, str],
) -> EncodedPart | Failed:
    """The tensors in the dtype of the cache, or Failed where one is not finite in it."""
    dtype = encoders.settings.dtype
    cast = {name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}
    for name, tensor in cast.items():
        if not tensor.isfinite().all():
            return Failed(f"its {name} is not finite in {dtype}", digests=digests)
    return EncodedPart(cast, notes, [encoders.made_with], digests)


def open_member(planned: PlannedSample, settings: EncodeSettings) -> Opened:
    """Open an image: pixels, mask and sizes of each variant, or why there are none."""
    record = planned.record
    try:
        data = record.image.read()
        mask = None if record.mask is None else record.mask.read()
    except ValueError as error:  # it changed
        return Opened(Failed(str(error), is_permanent=False), {})
    except OSError as error:
        if error.errno not in FILE_ERRNOS:
            raise
        failed = Failed(f"while the dataset was encoded: {explain(error)}", is_permanent=False)
        return Opened(failed, {})
    digests = {"picture": hashlib.sha256(data).hexdigest()}
    if mask is not None:
        digests["mask"] = hashlib.sha256(mask).hexdigest()
    image, mask_digest = (short_digest(digests.get(name, "")) for name in ("picture", "mask"))
    if (planned.image_digest or image, planned.mask_digest) != (image, mask_digest):
        failed = Failed(
            "it changed, and its size and time do not show it; encode again with --rehash",
            is_permanent=False,
        )
        return Opened(failed, {})
    return Opened(_open_variants(planned, settings, data, mask), digests)


def _open_variants(
    planned: PlannedSample, settings: EncodeSettings, data: bytes, mask: bytes | None
) -> list[Pixels] | Failed:
    """Render the variants, but for those that the mask hides completely, which have no loss."""
    try:
        with limit_large_images(planned.variants[0].original):
            images = render_variants(open_image(data), planned.variants)
    except Exception as error:  # Pillow raises anything of a bad file
        return Failed(explain(error))
    try:
        masks = _open_masks(data, mask, planned, settings)
    except Exception as error:
        return Failed(f"its mask: {explain(error)}")
    sizes = [torch.tensor(variant.sizes, dtype=torch.int32) for variant in planned.variants]
    # Here, in a thread beside the encoding: it takes milliseconds a megapixel.
    colors = [mean_colors(normalize(image[None]))[0] for image in images]
    variants = [Pixels(*parts) for parts in zip(images, colors, masks, sizes, strict=True)]
    if masks.numel():
        variants = [
            variant for variant in variants if shows_anything(variant.mask, DTYPES[settings.dtype])
        ]
    return variants or Failed(
        "its mask: all of it is black in the part of the image that is kept; what is white in it "
        "is cropped off",
        is_hidden=True,
    )


def _open_masks(
    data: bytes, mask: bytes | None, planned: PlannedSample, settings: EncodeSettings
) -> torch.Tensor:
    """The mask of each variant: [V, 1, h, w], or [V, 0] where the image has none."""
    shares: Gray | None = None
    if mask is not None:
        shares = open_mask(mask, planned.variants[0].original)
    elif settings.mask_from_alpha:
        shares = open_alpha(data)
    if shares is None:
        return torch.empty(len(planned.variants), 0)
    return render_mask(shares, planned.variants)
