"""The page of a cache: what was encoded, what was rejected, and every sample to look through."""

import base64
import io
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from pages.images import Embedded, thinned
from pages.page import render, write_page
from pages.settings import show
from runtime.path_kinds import check_page
from sdxl.latent_rgb import color_map, latents_to_rgb
from shards.buckets import bucket_name
from shards.inspect import Contents, describe_roles, read_rejected
from shards.reader import Cache, Shard

MAX_SAMPLES = 20_000  # on a page; of more, evenly spaced ones are shown
SIDES = ((1_000, 128), (4_000, 96), (MAX_SAMPLES, 64))  # pixels of an image among so many
MAX_CAPTIONS = 5  # of a sample
MAX_CAPTION = 2_000  # characters
MAX_REJECTED = 2_000  # rows
MAX_COMMON = 20  # captions
CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class Caption:
    """A caption, how many tokens it has (without the two marks), and whether they are too many."""

    text: str
    num_tokens: int | None
    is_cut: bool


@dataclass(frozen=True)
class Card:
    """A sample as it is shown."""

    path: str
    bucket: str
    image: Embedded | None
    captions: list[Caption]
    num_more_captions: int
    num_variants: int
    has_cut_captions: bool
    same_as: str  # the path of another sample of an equal image file; empty if there is none


def write_cache_page(
    cache: Cache, contents: Contents, out: Path, count_tokens: CountTokens | None = None
) -> Path:
    """Write the page of a cache. ``count_tokens`` is its tokenizer's, where it is at hand.

    Raises:
        CacheError: something in the cache is damaged.
        ValueError: ``out`` is a file of another program.
        OSError: the page cannot be written.
    """
    check_page(out)
    num_samples = cache.manifest["num_samples"]
    cards = [*_cards(cache, num_samples, count_tokens)]
    lengths = sorted(len(text) for text in contents.captions.elements())
    tokens = [c.num_tokens for card in cards for c in card.captions if c.num_tokens is not None]
    rejected = read_rejected(cache)
    html = render(
        "cache.html",
        name=_name(cache.folder.resolve()),
        manifest=cache.manifest,
        megabytes=sum(shard["bytes"] for shard in cache.manifest["shards"]) / 1e6,
        contents=contents,
        buckets=_buckets(contents),
        median_length=statistics.median_low(lengths) if lengths else 0,
        lengths=lengths[:1] + lengths[-1:],
        tokens=(min(tokens), statistics.median_low(tokens), max(tokens)) if tokens else None,
        num_cut=sum(card.has_cut_captions for card in cards),
        num_equal=sum(bool(card.same_as) for card in cards),
        room=_room(cache),
        common=contents.captions.most_common(MAX_COMMON),
        roles=describe_roles(contents),
        folders=contents.folders.most_common(MAX_COMMON),
        recipe=_recipe(cache.manifest.get("recipe", {})),
        latents=cache.manifest.get("latents", {}),
        cards=cards,
        rejected=rejected[:MAX_REJECTED],
        num_rejected=len(rejected),
        reasons=contents.rejected.most_common(MAX_COMMON),
    )
    write_page(out, html)
    return out


def _name(folder: Path) -> str:
    """The name of a cache's folder; of a part with that of its cache."""
    return f"{folder.parent.name}/{folder.name}" if folder.name in ("train", "val") else folder.name


def _room(cache: Cache) -> int:
    """Tokens that a caption may have: 75 in each of the chunks, which have two marks."""
    tokens = cache.manifest["text"]["tokens"]
    return int(tokens - tokens // 77 * 2)


def _cards(cache: Cache, num_samples: int, count_tokens: CountTokens | None) -> Iterator[Card]:
    rows = [(shard, row) for shard in cache.shards() for row in range(len(shard.index))]
    chosen = thinned(rows, MAX_SAMPLES)
    side = next(side for most, side in SIDES if len(chosen) <= most)
    colors = cache.manifest.get("latent_rgb")
    paths: dict[str, str] = {}  # of the first sample of each image file, by its digest
    for shard, row in tqdm(chosen, unit="sample", desc="page", leave=False):
        fields = shard.metadata(row)
        digest = fields["digests"].get("picture")
        first = paths.setdefault(digest, fields["path"]) if digest else fields["path"]
        notes = fields.get("notes", {}).get("text")
        shown = fields["captions"][:MAX_CAPTIONS]
        captions = [_caption(text, count_tokens, _room(cache)) for text in shown]
        num_cut = notes.get("num_cut_captions", 0) if isinstance(notes, dict) else 0
        yield Card(
            path=fields["path"],
            bucket=bucket_name(shard.index.header["bucket"]),
            image=None if colors is None else draw_sample(shard, row, colors, side),
            captions=captions,
            num_more_captions=len(fields["captions"]) - len(captions),
            num_variants=int(shard.index.records[row]["num_variants"]),
            has_cut_captions=bool(num_cut) or any(caption.is_cut for caption in captions),
            same_as="" if first == fields["path"] else first,
        )


def _caption(text: str, count_tokens: CountTokens | None, room: int) -> Caption:
    num = None if count_tokens is None else count_tokens(text)
    short = text if len(text) <= MAX_CAPTION else f"{text[:MAX_CAPTION]}…"
    return Caption(short, num, num is not None and num > room)


def draw_sample(shard: Shard, row: int, colors: dict[str, Any], side: int) -> Embedded:
    """The first variant in the colors of the cache's color map, at most ``side`` pixels.

    Raises:
        CacheError: its latents are damaged.
    """
    latents = torch.empty(shard.index.layout.latent, dtype=torch.float32)
    shard.read_into(latents, row, "latents.mean", 0)
    rgb = latents_to_rgb(latents[None], **color_map(colors))
    levels = (rgb[0].permute(1, 2, 0).nan_to_num(0) * 255).round().to(torch.uint8).numpy()
    image = Image.fromarray(np.ascontiguousarray(levels))
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, format="WEBP", quality=60, method=0)
    text = base64.b64encode(file.getvalue()).decode()
    return Embedded(f"data:image/webp;base64,{text}", *image.size)


def _buckets(contents: Contents) -> list[tuple[str, int, float, float]]:
    """Name, samples, MB, and share of the fullest one."""
    most = max(contents.buckets.values(), default=1)
    return [
        (name, count, contents.bucket_bytes[name] / 1e6, count / most)
        for name, count in sorted(contents.buckets.items())
    ]


def _recipe(recipe: dict[str, Any]) -> list[tuple[str, str]]:
    """What made the cache; of digests the start."""
    rows = []
    for cause, parts in sorted(recipe.items()):
        items = parts.items() if isinstance(parts, dict) else [("", parts)]
        for name, value in items:
            if value is not None:
                text = show(value)
                is_digest = len(text) == 64 and " " not in text
                rows.append((f"{cause} {name}".strip(), text[:12] if is_digest else text))
    return rows
