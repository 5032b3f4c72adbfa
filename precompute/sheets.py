"""Contact sheets of a cache: what was encoded and what was cropped away, drawn without the VAE."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from sdxl.contact_sheet import MAP_COLORS, MAX_TILES, TILE, contact_sheet, of_all
from sdxl.latent_rgb import color_map, latents_to_rgb
from shards.buckets import bucket_name, cover
from shards.format import CacheError
from shards.reader import Cache, Shard

MAX_PIXELS = 1_000_000  # of a side
CUT_AWAY, FRAME, BOX = (205, 205, 205), (120, 120, 120), (230, 0, 90)


def write_sheets(cache: Cache, out: Path) -> Iterator[Path]:
    """A sheet a bucket, ``WIDTHxHEIGHT.png`` in ``out``: its first samples in key order.

    Raises:
        CacheError: the cache has no map from latents to colors, or is damaged.
    """
    if "latent_rgb" not in cache.manifest:
        raise CacheError(f"{cache.folder}: its manifest has no latent_rgb map; encode it again")
    shards: dict[str, list[Shard]] = {}
    for shard in cache.shards():
        shards.setdefault(bucket_name(shard.index.header["bucket"]), []).append(shard)
    out.mkdir(parents=True, exist_ok=True)
    for bucket, members in sorted(shards.items()):
        tiles = [*islice(_tiles(cache, members), MAX_TILES)]
        num = sum(int(shard.index.records["num_variants"].sum()) for shard in members)
        path = out / f"{bucket}.png"
        title = f"{bucket}: {of_all(len(tiles), num)}; {MAP_COLORS}; box: what is cached"
        contact_sheet(tiles, title=title).save(path)
        yield path


def _tiles(cache: Cache, shards: list[Shard]) -> Iterator[tuple[Image.Image, str]]:
    fitted = color_map(cache.manifest["latent_rgb"])
    is_squashed = cache.manifest["recipe"].get("preprocessing", {}).get("mode") == "squash"
    for shard in shards:
        layout = shard.index.layout
        for row in range(len(shard.index)):
            fields = shard.metadata(row)
            for number in range(int(shard.index.records[row]["num_variants"])):
                latents = torch.empty(layout.latent, dtype=torch.float32)
                sizes = torch.empty(6, dtype=torch.int32)
                shard.read_into(latents, row, "latents.mean", number)
                shard.read_into(sizes, row, "sizes", number)
                colors = latents_to_rgb(latents[None], **fitted)[0]
                place = [int(value) for value in sizes]
                if min(*place[:2], *place[4:]) < 1 or max(map(abs, place)) > MAX_PIXELS:
                    raise CacheError(f"{shard.path}: sample {row}: its sizes are {place}")
                text = f"{place[1]}x{place[0]}  {fields['captions'][0]}"
                yield frame(colors, place, is_squashed), text


def frame(colors: torch.Tensor, sizes: list[int], is_squashed: bool = False) -> Image.Image:
    """A cached crop within the frame of its whole image, which is gray where it was cropped away.

    ``colors`` [3, h, w] in 0..1; ``sizes`` as a sample has them. The crop is boxed. What was
    squashed keeps the shape of its bucket: nothing was cut away.
    """
    original_height, original_width, top, left, height, width = sizes
    target = (width, height)
    geometry = cover((original_width, original_height), target)
    full_size = target if is_squashed else geometry.resized
    full_size = (max(full_size[0], left + width), max(full_size[1], top + height))
    scale = (TILE - 8) / max(full_size)

    def scaled(*lengths: int) -> list[int]:
        return [round(length * scale) for length in lengths]

    canvas = Image.new("RGB", (TILE, TILE), "white")
    x, y = ((TILE - length) // 2 for length in scaled(*full_size))
    pen = ImageDraw.Draw(canvas)
    frame_width, frame_height = scaled(*full_size)
    pen.rectangle((x, y, x + frame_width, y + frame_height), fill=CUT_AWAY, outline=FRAME)
    box_x, box_y = (start + offset for start, offset in zip((x, y), scaled(left, top), strict=True))
    box_width, box_height = (max(1, length) for length in scaled(width, height))
    pixels = (colors.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image = image.resize((box_width, box_height), Image.Resampling.BICUBIC)
    canvas.paste(image, (box_x, box_y))
    pen.rectangle((box_x, box_y, box_x + box_width, box_y + box_height), outline=BOX)
    return canvas
