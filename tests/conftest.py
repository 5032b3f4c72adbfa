"""A small random SDXL, a few drawn images and caches of them, made once and not changed."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = (
    "1"  # children compute with the same bits; small models gain nothing
)

from runtime.errors import silence_libraries

silence_libraries()  # before they are imported
# A shell that runs the tests in the background lets them ignore Ctrl-C, and so their children.
signal.signal(signal.SIGINT, signal.default_int_handler)

import encodes
import pretended_cuda

from precompute.encode import encode
from precompute.settings import EncodeSettings
from tools.draw_images import draw_images
from tools.random_base import make_random_base

torch.set_num_threads(1)
Encode = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def _own_fingerprints(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("xdg-cache"))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight SDXL in diffusers layout. Copy it before you change it."""
    folder = tmp_path_factory.mktemp("base")
    make_random_base(folder)
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """14 captioned images: 64x64, 85x53 and 53x85 pixels."""
    folder = tmp_path_factory.mktemp("images")
    draw_images(folder, count=14, size=64)
    return folder


@pytest.fixture(scope="session")
def encode_to(base: Path) -> Encode:
    """``encode_to(dataset, out, **settings)``: a cache at 64 pixels, buckets in steps of 16."""

    def run(dataset: Path, out: Path, **settings: Any) -> Path:
        defaults: dict[str, Any] = {
            "base": str(base),
            "resolution": 64,
            "bucket_step": 16,
            "batch_size": 4,
            "threads": 1,
        }
        encode(EncodeSettings(dataset=dataset, out=out, **{**defaults, **settings}))
        return out

    return run


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory, images: Path, encode_to: Encode) -> Path:
    """The 14 images, in fp32: 3 buckets of 5, 5 and 4. Copy it before you change it."""
    return encode_to(images, tmp_path_factory.mktemp("cache") / "cache", dtype="fp32")


@pytest.fixture(scope="session")
def split_cache(tmp_path_factory: pytest.TempPathFactory, images: Path, encode_to: Encode) -> Path:
    """The same in fp16, split into train and val."""
    out = tmp_path_factory.mktemp("split") / "cache"
    return encode_to(images, out, val_share=0.3)


@pytest.fixture(scope="session")
def role_cache(tmp_path_factory: pytest.TempPathFactory, images: Path, encode_to: Encode) -> Path:
    """``split_cache`` with roles: each image's text is short, and every other image has tags."""
    folder = tmp_path_factory.mktemp("roles")
    shutil.copytree(images, folder / "images")
    for text in sorted((folder / "images").rglob("*.txt"))[::2]:
        text.with_suffix(".tags").write_text("one tag, another")
    roles = "short=.txt,tags=.tags"
    return encode_to(folder / "images", folder / "cache", val_share=0.3, caption_roles=roles)


@pytest.fixture(scope="session")
def sdxl_configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base folder with the config of SDXL's UNet by its published sizes, and no weights."""
    folder = tmp_path_factory.mktemp("sdxl") / "unet"
    folder.mkdir()
    config = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 128,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder.parent


@pytest.fixture(scope="session")
def finished(images: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``data`` and its ``cache``: six shards of at most three."""
    folder = tmp_path_factory.mktemp("finished")
    encodes.encode(encodes.copy_old(images, folder / "data"), base, folder / "cache")
    return folder


@pytest.fixture
def work(finished: Path, tmp_path: Path) -> Path:
    """A copy of both, as it is after a rerun: all is remembered."""
    shutil.copytree(finished, tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture(scope="session")
def cuda() -> Iterator[pretended_cuda.PretendedCuda]:
    """``cuda(function, *args)``: the function's result where a CUDA device is pretended."""
    try:
        library = pretended_cuda.build(pretended_cuda.ROOT / "build")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    pretended = pretended_cuda.PretendedCuda(library)
    yield pretended
    pretended.close()
