"""Images at any scale: windows, small cards, several processes, kills, and who else is there."""

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawing import (
    PROMPTS,
    check_same,
    differ,
    draw,
    draw_on,
    images_in,
    reference,
    settings_of,
    start,
)
from PIL import Image

import infer.pipeline
from infer.generate import generate
from infer.outputs import why_stale
from infer.pipeline import TEXT, UNET, VAE, ModelSlots
from infer.requests import make_batches, make_requests
from infer.settings import GenerateSettings
from runtime.locks import locked
from sdxl.base import open_base
from sdxl.load import load_vae
from sdxl.prompt_files import Prompt
from sdxl.sampling import decode_latents
from sdxl.text_encoders import TextEncoders

LINES = [
    *PROMPTS,
    "a red circle --d 3 --n-images 4 --ss ddpm",
    "a yellow star --w 80 --h 48",
    "a blue square --n a red circle",
]


@pytest.mark.slow
def test_any_number_of_processes_draws_the_same(base: Path, tmp_path: Path) -> None:
    alone = draw(base, tmp_path / "1", LINES, batch_size=2)
    assert len(alone) == 9
    for world in (2, 3):
        settings = settings_of(base, tmp_path / str(world), LINES, batch_size=2, window=5)
        draw_on(settings, world)
        check_same(images_in(settings.out), alone)
        for name in ("captions.jsonl", "contact-sheet.png"):
            assert (settings.out / name).read_bytes() == (tmp_path / "1" / name).read_bytes()


@pytest.mark.slow
def test_batch_size_changes_no_image(base: Path, tmp_path: Path) -> None:
    """Mean absolute difference of at most 1e-4, of images in 0..1."""
    at_once = draw(base, tmp_path / "8", LINES, batch_size=8)
    for size in (1, 3):
        drawn = draw(base, tmp_path / str(size), LINES, batch_size=size)
        assert differ(drawn, at_once) <= 1e-4 * 255


@pytest.fixture
def worked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which model was put to work, in order; and that on a small card it was alone there."""
    results: list[str] = []
    real = ModelSlots.acquire

    def acquire(self: ModelSlots, name: str) -> Any:
        model = real(self, name)
        if not results or results[-1] != name:
            results.append(name)
        assert not self.takes_turns or self._on_device == {name}
        return model

    monkeypatch.setattr(ModelSlots, "acquire", acquire)
    return results


@pytest.mark.slow
def test_on_a_small_card_each_model_has_its_turn(
    base: Path, tmp_path: Path, worked: list[str]
) -> None:
    big = draw(base, tmp_path / "big", LINES, batch_size=2, window=5)
    assert worked == [TEXT, *[UNET, VAE] * 2, TEXT, *[UNET, VAE] * 3]
    worked.clear()
    small = draw(base, tmp_path / "small", LINES, batch_size=2, window=5, low_memory=True)
    assert worked == [TEXT, UNET, VAE] * 2
    check_same(small, big)


def test_equal_texts_are_encoded_once(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: Counter[str] = Counter()
    real = TextEncoders.encode

    def encode(self: TextEncoders, prompts: list[str], batch_size: int) -> Any:
        encoded.update(prompts)
        return real(self, prompts, batch_size)

    monkeypatch.setattr(TextEncoders, "encode", encode)
    lines = [f"{text} --n a black square" for text in PROMPTS]
    draw(base, tmp_path / "out", lines, num_images=8, num_steps=1, window=3, batch_size=2)
    assert encoded == Counter([*PROMPTS, "a black square", ""])


class FakeModel:
    """So many bytes of weights, and where they are."""

    def __init__(self, size: int) -> None:
        self.weight, self.device = torch.nn.Parameter(torch.empty(size // 4)), "cpu"

    def parameters(self) -> list[torch.nn.Parameter]:
        return [self.weight]

    def to(self, device: torch.device) -> None:
        self.device = device.type


@pytest.mark.parametrize(("free", "small"), [(1000, False), (999, True)])
def test_what_is_free_decides_whether_models_take_turns(
    monkeypatch: pytest.MonkeyPatch, free: int, small: bool
) -> None:
    """400 + 200 bytes are still to come, and work takes 400; the text encoders are there."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free - 100, 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 200)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 100)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    fakes = {TEXT: FakeModel(300), UNET: FakeModel(400), VAE: FakeModel(200)}
    loaders: Any = {name: (lambda model=model: model) for name, model in fakes.items()}
    models = ModelSlots(torch.device("cuda"), loaders, 400, None)
    for name in (TEXT, UNET, VAE):
        assert models.acquire(name) is fakes[name]
    assert models.takes_turns == small
    where = [model.device for model in fakes.values()]
    assert where == (["cpu", "cpu", "cuda"] if small else ["cuda"] * 3)


@pytest.mark.slow
def test_large_images_are_decoded_in_tiles(base: Path, tmp_path: Path) -> None:
    lines = [f"{text} --w 96 --h 96" for text in PROMPTS]
    tiled = draw(base, tmp_path / "tiled", lines, vae_tiling=True)
    size = {"height": 96, "width": 96}
    check_same(tiled, reference(base, PROMPTS, lambda p: p.vae.enable_tiling(), **size))
    complete = draw(base, tmp_path / "whole", lines)
    assert differ(tiled, complete) > 0.01
    settings = settings_of(base, tmp_path / "x", PROMPTS)
    sizes = [Prompt(text="a", width=side, height=1536) for side in (1536, 1544)]
    assert [request.tiled for request in make_requests(settings, sizes, 64)] == [False, True]


def test_a_vae_that_overflows_in_half_decodes_in_fp32(base: Path) -> None:
    vae: Any = load_vae(open_base(base).vae, torch.float16)
    with torch.no_grad():
        vae.decoder.conv_in.weight.mul_(3e4)
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert not decode_latents(vae, latents).isfinite().all()
    result = infer.pipeline._decode_images(vae, latents)
    assert vae.dtype == torch.float16
    assert torch.equal(result, decode_latents(vae.to(torch.float32), latents))


def test_an_infinite_pixel_is_no_white_one(base: Path) -> None:
    vae: Any = load_vae(open_base(base).vae, torch.float16)
    with torch.no_grad():
        vae.decoder.conv_out.bias.fill_(6e4)
        vae.decoder.conv_out.weight.mul_(1e4)  # the last layer: nothing after it makes NaN of inf
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (vae.decode(latents.half()).sample == torch.inf).any()
    assert not decode_latents(vae, latents).isfinite().all()
    assert infer.pipeline._decode_images(vae, latents).isfinite().all()


def test_an_image_that_is_not_finite_is_no_image(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **options: Any) -> torch.Tensor:
        return torch.full((3, 4, 8, 8), torch.nan)

    monkeypatch.setattr(infer.pipeline, "sample_latents", broken)
    with pytest.raises(FloatingPointError, match=r"image 0 \('a red circle'\) is not finite"):
        draw(base, tmp_path / "out", PROMPTS)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.slow
def test_a_kill_leaves_no_half_image(base: Path, tmp_path: Path) -> None:
    settings = settings_of(base, tmp_path / "out", PROMPTS * 3, batch_size=1, num_steps=8)
    (process,) = start(settings, 1)
    while len(list(settings.out.glob("*.png"))) < 2:
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (settings.out / "000008.png.partial").write_bytes(b"half")
    mtimes = {path: path.stat().st_mtime_ns for path in settings.out.glob("*.png")}
    assert 2 <= len(mtimes) < 9
    for path in mtimes:
        Image.open(path).load()
    report = generate(settings)
    assert report is not None and report.num_kept == len(mtimes) == 9 - report.num_generated
    assert all(path.stat().st_mtime_ns == mark for path, mark in mtimes.items())
    assert not list(settings.out.glob("*.partial"))
    check_same(
        images_in(settings.out),
        draw(base, tmp_path / "whole", PROMPTS * 3, batch_size=1, num_steps=8),
    )


def test_two_runs_do_not_draw_into_one_folder(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with (
        locked(out / "generate.lock"),
        pytest.raises(ValueError, match="out: another generate writes to it"),
    ):
        draw(base, out, PROMPTS[:1], num_steps=1)
    assert draw(base, out, PROMPTS[:1], num_steps=1)


def test_any_flipped_bit_is_seen(base: Path, tmp_path: Path) -> None:
    draw(base, tmp_path / "out", PROMPTS[:1], num_steps=1)
    path = tmp_path / "out" / "000000.png"
    data = path.read_bytes()
    with Image.open(path) as image:
        record = json.loads(image.info["shardtune"])
    assert why_stale(path, record) is None
    for place in np.random.default_rng(0).permutation(len(data))[:400].tolist():
        broken = bytearray(data)
        broken[place] ^= 1 << (place % 8)
        path.write_bytes(broken)
        if place < len(data) - 12:  # of the last chunk, IEND, nothing is read but its name
            assert why_stale(path, record), place
    for length in (0, 8, 100, len(data) // 2, len(data) - 13):
        path.write_bytes(data[:length])
        assert why_stale(path, record) == "damaged", length


def test_images_not_asked_for_are_named(base: Path, tmp_path: Path) -> None:
    draw(base, tmp_path / "out", PROMPTS, num_steps=1)
    with pytest.warns(UserWarning, match=r"000001.png and 1 more: not asked for this time"):
        draw(base, tmp_path / "out", PROMPTS[:1], num_steps=1)


def test_cocos_layout(base: Path, tmp_path: Path) -> None:
    lines = ["a cat --w 80 --h 48 --n-images 2", "ünïcode 🦊"]
    out = tmp_path / "out"
    draw(base, out, lines, num_steps=1, format="coco")
    data = json.loads((out / "annotations.json").read_text("utf-8"))
    for image in data["images"]:
        with Image.open(out / "images" / image["file_name"]) as opened:
            assert opened.size == (image["width"], image["height"])
    names = [image["file_name"] for image in data["images"]]
    assert names == [f"{number:012d}.png" for number in (1, 2, 3)]
    assert sorted(path.name for path in (out / "images").iterdir()) == names
    captions = {item["image_id"]: item["caption"] for item in data["annotations"]}
    assert captions == {1: "a cat", 2: "a cat", 3: "ünïcode 🦊"}
    assert sorted(data) == ["annotations", "images", "info", "licenses"]


def test_lines_take_turns(tmp_path: Path) -> None:
    prompts = [Prompt(text="a", num_images=2, seed=7), Prompt(text="b")]
    settings = GenerateSettings(base="x", out=tmp_path, prompt="unused", seed=100)
    drawings = make_requests(settings, prompts, 64)
    assert [(request.prompt, request.seed) for request in drawings] == [
        ("a", 7),
        ("a", 8),
        ("b", 102),
    ]
    more = GenerateSettings(base="x", out=tmp_path, prompt="unused", seed=100, num_images=5)
    drawings = make_requests(more, prompts, 64)
    seeds = [("a", 7), ("a", 8), ("b", 102), ("a", 9), ("a", 10)]
    assert [(request.prompt, request.seed) for request in drawings] == seeds
    batches = make_batches(drawings, 3)
    assert [[request.number for request in batch] for batch in batches] == [[0, 1, 3], [4, 2]]
    assert np.prod([len(batch) for batch in batches]) == 6


def test_fit_draws_fewer_images_at_a_time(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A pixel of a row is made to count 1 MB in fp32: 8.2 GB an image of two rows."""
    monkeypatch.setattr("infer.pipeline.UNET_BYTES", 500_000)
    singly = draw(base, tmp_path / "1", PROMPTS, batch_size=1, num_steps=2)
    assert "--fit" not in capsys.readouterr().out
    check_same(draw(base, tmp_path / "fit", PROMPTS, fit="9GB", num_steps=2), singly)
    assert "--fit 9GB: batches of 1, all models stay" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--fit 8GB: one image at a time takes about 8.2\d GB"):
        draw(base, tmp_path / "none", PROMPTS, fit="8GB", num_steps=2)


@pytest.mark.parametrize(("budget", "small"), [(1300, False), (1299, True)])
def test_a_budget_decides_whether_models_take_turns(budget: int, small: bool) -> None:
    fakes = {TEXT: FakeModel(300), UNET: FakeModel(400), VAE: FakeModel(200)}
    loaders: Any = {name: (lambda model=model: model) for name, model in fakes.items()}
    assert ModelSlots(torch.device("cuda"), loaders, 400, None, budget).takes_turns == small
