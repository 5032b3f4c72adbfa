"""Images are those of diffusers' own pipeline, and a folder of them goes on where it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from drawing import PROMPTS, check_equal, check_same, draw, reference
from PIL import Image

from infer.settings import LoraUse
from train.config import TrainConfig
from train.loop import train
from train.option_values import CacheUse

Trained = Callable[..., Path]


@pytest.fixture(scope="module")
def trained(cache: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    def run(**settings: Any) -> Path:
        out = tmp_path_factory.mktemp("run")
        defaults: dict[str, Any] = {"lr": 3e-2, "steps": 6, "batch_size": 4}
        if not settings.get("full"):
            defaults["targets"] = "all"
        return train(
            TrainConfig(
                caches=(CacheUse(cache),),
                base=str(base),
                out=out,
                device="cpu",
                **{**defaults, **settings},
            )
        )

    return run


def test_the_base_draws_as_the_pipeline_does(base: Path, tmp_path: Path) -> None:
    actual = draw(base, tmp_path / "out", PROMPTS)
    check_same(actual, reference(base, PROMPTS))
    assert np.abs(actual[0] - actual[1]).mean() > 5


@pytest.mark.slow
def test_negative_prompts_sizes_and_guidance(base: Path, tmp_path: Path) -> None:
    lines = [f"{prompt} --n a black square --w 80 --h 48 --l 3.5 --s 4" for prompt in PROMPTS]
    call = {"width": 80, "height": 48, "guidance_scale": 3.5, "num_inference_steps": 4}
    negative = ["a black square"] * 3
    expected = reference(base, PROMPTS, negative_prompt=negative, **call)
    check_equal(draw(base, tmp_path / "out", lines), expected)
    empty = draw(base, tmp_path / "empty", PROMPTS, negative="")
    check_equal(empty, reference(base, PROMPTS, negative_prompt=[""] * 3))
    without = draw(base, tmp_path / "without", PROMPTS, guidance_scale=1.0)
    check_equal(without, reference(base, PROMPTS, guidance_scale=1.0))


@pytest.mark.slow
def test_a_lora_has_its_strength_in_diffusers(base: Path, trained: Trained, tmp_path: Path) -> None:
    """Rank 8 with alpha 3: read as alpha = rank, or as alpha = 1, it would draw otherwise."""
    lora = trained(rank=8, alpha=3.0)
    actual = draw(base, tmp_path / "out", PROMPTS, lora=(LoraUse(lora),))
    expected = reference(base, PROMPTS, lambda pipeline: pipeline.load_lora_weights(str(lora)))
    check_equal(actual, expected)
    folder = str(lora.parent)
    check_equal(actual, reference(base, PROMPTS, lambda p: p.load_lora_weights(folder)))
    plain = reference(base, PROMPTS)
    assert (
        max(np.abs(first - second).mean() for first, second in zip(actual, plain, strict=True)) > 2
    )

    def stronger(pipeline: Any) -> None:
        pipeline.load_lora_weights(str(lora), adapter_name="one")
        pipeline.set_adapters("one", 8 / 3)

    wrong = reference(base, PROMPTS, stronger)
    assert (
        max(np.abs(first - second).mean() for first, second in zip(actual, wrong, strict=True)) > 1
    )


def test_the_file_adds_alpha_over_rank_times_its_product(base: Path, trained: Trained) -> None:
    """diffusers' fused weights, against W + alpha / r · B A computed from the file."""
    import safetensors.torch

    lora = trained(rank=8, alpha=3.0)
    pipeline = StableDiffusionXLPipeline.from_pretrained(str(base))
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    pipeline.load_lora_weights(str(lora))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    after = pipeline.unet.state_dict()
    state = safetensors.torch.load_file(lora)
    names = sorted(n.split(".lora_A")[0] for n in state if ".lora_A" in n)
    assert len(names) == len(state) // 2 > 30
    for name in names:
        product = state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
        weight = f"{name.removeprefix('unet.')}.weight"
        assert torch.allclose(after[weight], before[weight] + 3 / 8 * product, atol=1e-5), name
        assert product.abs().max() > 1e-4


def test_a_full_unet_draws_as_in_diffusers(base: Path, trained: Trained, tmp_path: Path) -> None:
    unet = trained(full=True, lr=1e-3)
    files = sorted(path.name for path in unet.iterdir())
    names = ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"]
    assert files == ["config.json", *names]
    assert str(base) not in (unet / "config.json").read_text(), "where the base lies is private"

    def replace(pipeline: Any) -> None:
        pipeline.unet = UNet2DConditionModel.from_pretrained(str(unet))
        assert pipeline.unet.dtype == torch.float32

    actual = draw(base, tmp_path / "out", PROMPTS, unet=unet)
    check_equal(actual, reference(base, PROMPTS, replace))
    plain = reference(base, PROMPTS)
    assert (
        max(np.abs(first - second).mean() for first, second in zip(actual, plain, strict=True)) > 2
    )
    half = UNet2DConditionModel.from_pretrained(str(unet), variant="fp16", torch_dtype=torch.half)
    complete = UNet2DConditionModel.from_pretrained(str(unet)).state_dict()
    for name, value in half.state_dict().items():
        assert torch.equal(value, complete[name].half())


@pytest.mark.slow
def test_a_rerun_draws_only_what_is_missing_or_other(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = draw(base, out, PROMPTS)
    marks = {path.name: path.stat().st_mtime_ns for path in out.glob("0*.png")}
    (out / "000001.png").unlink()
    check_equal(draw(base, out, PROMPTS), before)
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("0*.png")}
    changed = {name for name in marks if marks[name] != after[name]}
    assert changed == {"000001.png"}
    with pytest.warns(UserWarning, match=r"000000.png and 2 more: .*generated again: num_steps"):
        shorter = draw(base, out, PROMPTS, num_steps=3)
    complete = (out / "000002.png").read_bytes()
    (out / "000002.png").write_bytes(complete[: len(complete) // 2])
    with pytest.warns(UserWarning, match=r"000002.png: .*generated again: damaged"):
        again = draw(base, out, PROMPTS, num_steps=3)
    check_equal(again, shorter)


def test_someone_elses_image_is_not_overwritten(base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "out" / "000000.png")
    with pytest.raises(ValueError, match=r"000000.png: not drawn by shardtune"):
        draw(base, tmp_path / "out", PROMPTS[:1])


def test_num_images_takes_the_prompts_in_rotation(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    draw(base, out, ["a cat --d 7", "ünïcode 🦊"], num_images=5, num_steps=1)
    rows = [json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == ["a cat", "ünïcode 🦊"] * 2 + ["a cat"]
    assert [row["file_name"] for row in rows] == [f"{number:06d}.png" for number in range(5)]
    seeds = []
    for row in rows:
        with Image.open(out / row["file_name"]) as image:
            recorded = json.loads(image.info["shardtune"])
            assert image.info["parameters"].startswith(row["text"] + "\nSteps: 1, ")
            assert recorded["prompt"] == row["text"]
            seeds.append(recorded["seed"])
    assert seeds == [7, 12, 8, 14, 9]
    with Image.open(out / "contact-sheet.png") as sheet:
        assert sheet.size[0] == 3 * 256 + 2 * 4


def test_a_lora_of_another_model_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    import safetensors.torch

    name = "unet.down_blocks.7.attentions.0.transformer_blocks.0.attn1.to_q.lora_"
    file = tmp_path / "other.safetensors"
    tensors = {f"{name}A.weight": torch.zeros(4, 8), f"{name}B.weight": torch.zeros(8, 4)}
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(ValueError, match=r"other.safetensors: does not fit this base: .*blocks.7"):
        draw(base, tmp_path / "out", PROMPTS[:1], lora=(LoraUse(file),))
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"other.safetensors: no LoRA file"):
        draw(base, tmp_path / "out", PROMPTS[:1], lora=(LoraUse(file),))
