"""The miniature that comes with the checkout: what it is made of, and that the score can be
trusted. What it draws and learns: ``test_learning.py``."""

import json
import random
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image, ImageChops

import infer.generate
from infer.settings import GenerateSettings
from sdxl.base import MINIATURE_FOLDER, open_base
from sdxl.load import load_tokenizers, load_vae
from sdxl.sampling import scale_mean, scale_std
from shards.buckets import cover
from tools.miniature.data import (
    LIST,
    fresh_prompts,
    write_cropped_set,
    write_sample_set,
    write_training_set,
)
from tools.miniature.drawing import (
    COLORS,
    NEW_SHAPES,
    OLD_SHAPES,
    SENTENCES,
    TINY,
    Scene,
    draw_scene,
    random_scene,
)
from tools.miniature.response import measure_response
from tools.miniature.score import look_at, score

SHAPES = (*OLD_SHAPES, *NEW_SHAPES)


def drawn(shapes: tuple[str, ...], num: int, seed: int = 0) -> list[Image.Image]:
    choices = random.Random(seed)
    return [draw_scene(random_scene(choices, shapes), choices) for _ in range(num)]


def in_units(images: list[Image.Image]) -> torch.Tensor:
    """[N, 3, H, W] in -1..1."""
    rows = [torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8) for p in images]
    pixels = torch.stack(rows).view(len(images), 64, 64, 3).permute(0, 3, 1, 2)
    return pixels.float() / 127.5 - 1


def test_it_is_small_and_readable_by_all() -> None:
    files = [path for path in MINIATURE_FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6_000_000
    assert {path.stat().st_mode & 0o444 for path in files} == {0o444}
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".ckpt")]


def test_its_name_works_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "miniature").mkdir()  # a folder of that name is ./miniature
    assert open_base("miniature").unet.path == MINIATURE_FOLDER / "unet"


def test_it_is_an_sdxl() -> None:
    index = json.loads((MINIATURE_FOLDER / "model_index.json").read_bytes())
    assert index["_class_name"] == "StableDiffusionXLPipeline"
    assert index["force_zeros_for_empty_prompt"] is True
    scheduler = json.loads((MINIATURE_FOLDER / "scheduler/scheduler_config.json").read_bytes())
    assert (scheduler["beta_start"], scheduler["beta_end"]) == (0.00085, 0.012)
    assert scheduler["beta_schedule"] == "scaled_linear"
    assert scheduler["prediction_type"] == "epsilon"
    unet = json.loads((MINIATURE_FOLDER / "unet/config.json").read_bytes())
    assert unet["addition_embed_type"] == "text_time"
    assert unet["down_block_types"] == [
        "DownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
    ]


def test_its_tokenizers_take_any_text_and_pad_as_sdxls_do() -> None:
    first, second = load_tokenizers(open_base("miniature"))
    for tokenizer in (first, second):
        assert tokenizer.model_max_length == 77
        for text in ("a small red heart", "zebra æøå 漢字 🙂"):
            back = tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)
            assert back.strip() == text
    padded = [t("a", padding="max_length").input_ids for t in (first, second)]
    assert padded[0][3:] == [first.eos_token_id] * 74
    assert padded[1][3:] == [0] * 74
    assert len(first("a small purple triangle on a white ground").input_ids) == 2 + 8


def test_its_scaled_latents_have_variance_1() -> None:
    vae = load_vae(open_base("miniature").vae, torch.float32)
    with torch.inference_mode():
        posterior = vae.encode(in_units(drawn(OLD_SHAPES, 64))).latent_dist
    std = scale_std(vae.config, posterior.std)
    latents = scale_mean(vae.config, posterior.mean) + std * torch.randn(
        std.shape, generator=torch.Generator().manual_seed(0)
    )
    assert 0.9 < latents.std() < 1.1
    assert std.min() > 1e-4, "its posterior is a point"


def test_its_vae_shows_shapes_that_it_was_not_trained_on() -> None:
    vae = load_vae(open_base("miniature").vae, torch.float32)
    scenes, _ = fresh_prompts(48, NEW_SHAPES, seed=3)
    images = [draw_scene(scene, random.Random(number)) for number, scene in enumerate(scenes)]
    with torch.inference_mode():
        decoded = vae.decode(vae.encode(in_units(images)).latent_dist.mean).sample
    levels = ((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    scores = score(scenes, [Image.fromarray(level.numpy()) for level in levels])
    assert scores.both >= 0.95, scores


def test_diffusers_draws_with_it_what_generate_draws(tmp_path: Path) -> None:
    prompt = "a large red circle on a white ground"
    pipeline = StableDiffusionXLPipeline.from_pretrained(MINIATURE_FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt, num_inference_steps=4, generator=torch.Generator().manual_seed(7)
    ).images[0]
    settings = GenerateSettings(
        base="miniature", out=tmp_path, prompt=prompt, seed=7, num_steps=4, device="cpu"
    )
    infer.generate.generate(settings)
    with Image.open(tmp_path / "000000.png") as actual:
        assert max(top for _, top in ImageChops.difference(actual, expected).getextrema()) <= 1


def test_it_loads_without_a_dtype() -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(MINIATURE_FOLDER)
    dtypes = {getattr(pipeline, name).dtype for name in ("unet", "vae", "text_encoder")}
    assert dtypes == {torch.float32}


@pytest.mark.slow
def test_it_answers_the_size_and_crop_numbers() -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(MINIATURE_FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    plain, tiny, wide, high = (
        measure_response(pipeline, setting, num=32, seed=4, num_steps=10)
        for setting in (
            "64x64",
            "5x5",
            "64 high, 96 wide, cropped by 16 on the left",
            "96 high, 64 wide, cropped by 16 at the top",
        )
    )
    assert tiny["sharpness"] <= 0.8 * plain["sharpness"]
    assert wide["cut_sides"] >= plain["cut_sides"] + 0.2
    assert high["cut_ends"] >= plain["cut_ends"] + 0.2


@pytest.mark.parametrize("size", [(64, 64), (80, 48)])
def test_the_score_of_true_images_is_1(size: tuple[int, int]) -> None:
    scenes, _ = fresh_prompts(60, SHAPES, seed=1)
    images = [draw_scene(scene, random.Random(n), *size) for n, scene in enumerate(scenes)]
    scores = score(scenes, images)
    assert (scores.shape, scores.colors, scores.both) == (1, 1, 1)
    assert scores.overlap > 0.9


def test_the_score_sees_what_is_wrong() -> None:
    scenes, _ = fresh_prompts(60, SHAPES, seed=2)
    images = [draw_scene(scene, random.Random(n)) for n, scene in enumerate(scenes)]
    shifted = score(scenes, [*images[1:], images[0]])
    assert (shifted.shape, shifted.both) == (0, 0)
    gray = look_at(Image.new("RGB", (64, 64), "gray"))
    assert gray.color == gray.ground
    assert max(gray.overlaps.values()) == 0
    noise = Image.effect_noise((64, 64), 100).convert("RGB")
    assert max(look_at(noise).overlaps.values()) < 0.7


def test_captions_are_english() -> None:
    orange = Scene(shape="arrow", color="orange", ground="orange", position="on the left")
    captions = {orange.caption(random.Random(seed)) for seed in range(60)}
    assert len(captions) == len(SENTENCES)
    assert "an orange arrow on the left on an orange ground" in captions
    assert not [caption for caption in captions if "a orange" in caption]


def test_the_training_images_are_blurred_and_cropped(tmp_path: Path) -> None:
    write_training_set(tmp_path / "any-size", num=60)
    write_cropped_set(tmp_path / "cropped", num=30)
    sizes: dict[str, list[tuple[int, int]]] = {"any-size": [], "cropped": []}
    for name in ("any-size", "cropped"):
        for path in (tmp_path / name).glob("*.png"):
            with Image.open(path) as image:
                sizes[name].append(image.size)
    assert sizes["any-size"].count((64, 64)) >= 30
    assert len([size for size in sizes["any-size"] if max(size) <= max(TINY)]) >= 5
    assert all(sum(cover(size, (64, 64)).crop) >= 6 for size in sizes["cropped"])


def test_the_sample_dataset_says_what_it_shows(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_sample_set(tmp_path / name, num=24)
    rows = [json.loads(line) for line in (tmp_path / "one" / LIST).read_text().splitlines()]
    sizes, words = set(), set()
    for row in rows:
        data = (tmp_path / "one" / row["file_name"]).read_bytes()
        assert data == (tmp_path / "two" / row["file_name"]).read_bytes()
        with Image.open(tmp_path / "one" / row["file_name"]) as image:
            seen = look_at(image.convert("RGB"))
            sizes.add(image.size)
        sentence = row["text"].replace(",", "").split()
        assert seen.shape in sentence
        assert {seen.color, seen.ground} == set(sentence) & set(COLORS)
        words |= set(sentence)
    assert set(NEW_SHAPES) <= words
    assert sizes == {(64, 64), (80, 48), (48, 80)}
