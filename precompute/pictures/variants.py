"""The variants of an image that are cached: random crops, and all of them mirrored."""

from dataclasses import replace

import numpy as np

from precompute.settings import EncodeSettings
from shards.buckets import Geometry
from shards.plan import derive_key


def plan_variants(centre: Geometry, settings: EncodeSettings, key: str) -> tuple[Geometry, ...]:
    """The variants of the sample ``key``, those that are mirrored last.

    Random crops depend on the key alone: they are the same in every run, and a larger ``--crops``
    only adds. They are all different; where there are fewer places than crops, each place once.
    """
    crops = random_crops(centre, settings.crops, key) if settings.crops else (centre,)
    return (*crops, *(crop.mirrored() for crop in crops)) if settings.flip else crops


def random_crops(centre: Geometry, num: int, key: str) -> tuple[Geometry, ...]:
    """``num`` different crops at whole pixels of the resized image, each as likely as another."""
    (rw, rh), (tw, th) = centre.resized, centre.target
    columns, rows = rw - tw + 1, rh - th + 1
    generator = np.random.Generator(np.random.Philox(key=derive_key("crops", key)))
    places: dict[int, None] = {}
    while len(places) < min(num, columns * rows):
        places[int(generator.integers(columns * rows))] = None
    return tuple(replace(centre, crop=(at % columns, at // columns)) for at in places)
