"""Several LoRAs at once, on the base or a fine-tuned UNet, compared with none; any checkpoint."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from drawing import (
    PROMPTS,
    Images,
    check_equal,
    check_same,
    differ,
    draw,
    reference,
)
from loras import made_lora, text_lora
from PIL import Image
from runs import run

from infer.export import export
from infer.export_settings import ExportSettings
from infer.generate import _provenance, make_pipeline
from infer.requests import make_requests
from infer.settings import GenerateSettings, LoraUse
from sdxl.lora.names import KOHYA, LORA
from sdxl.lora.write import lora_bytes
from sdxl.metadata import ModelMetadata
from sdxl.prompt_files import parse_prompt
from train.option_values import Every


@pytest.fixture(scope="module")
def loras(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two random LoRAs; the second as kohya's file, with parts for both text encoders."""
    folder = tmp_path_factory.mktemp("loras")
    made_lora(base, folder / "one", rank=8, alpha=3.0, targets="all")
    made_lora(base, folder / "two", rank=4, alpha=8.0)
    both = safetensors.torch.load_file(folder / "two" / KOHYA) | text_lora(4, 8.0, (32, 48))
    safetensors.torch.save_file(both, folder / "both.safetensors")
    return folder / "one" / LORA, folder / "both.safetensors"


def with_loras_of(loras: tuple[Path, Path]) -> Any:
    """The change to diffusers' pipeline that two LoRAs at their weights are."""

    def change(pipeline: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of peft: that there is one already
            for name, path in zip("ab", loras, strict=True):
                pipeline.load_lora_weights(str(path), adapter_name=name)
        pipeline.set_adapters(["a", "b"], [0.8, 0.5])

    return change


@pytest.mark.slow
def test_several_with_weights(base: Path, loras: tuple[Path, Path], tmp_path: Path) -> None:
    uses = (LoraUse.parse(f"{loras[0]},0.8"), LoraUse.parse(f"{loras[1]},0.5"))
    actual = draw(base, tmp_path / "out", PROMPTS, lora=uses)
    check_equal(actual, reference(base, PROMPTS, with_loras_of(loras)))
    with Image.open(tmp_path / "out" / "000000.png") as image:
        line = image.info["parameters"].splitlines()[-1]
    assert line.endswith('Lora weights: "pytorch_lora_weights: 0.8, both: 0.5"')
    with pytest.warns(UserWarning, match="generated again: weights changed"):
        first = draw(base, tmp_path / "out", PROMPTS, lora=(*uses[:1], LoraUse(loras[1], 0.4)))
    assert differ(first, actual) > 0.1


def both_sides(images: Images, side: int = 64) -> tuple[Images, Images]:
    """The images of both sides, without their labels."""
    assert all(image.shape == (side + 20, 2 * side + 4, 3) for image in images)
    return [image[20:, :side] for image in images], [image[20:, side + 4 :] for image in images]


@pytest.mark.slow
def test_compare_draws_with_and_without(
    base: Path, loras: tuple[Path, Path], tmp_path: Path
) -> None:
    """Also where a LoRA changes the text encoders, and the base is told the unchanged text."""
    uses = (LoraUse(loras[0], 0.8), LoraUse(loras[1], 0.5))
    drawn = draw(base, tmp_path / "both", PROMPTS, lora=uses, compare=True, low_memory=True)
    without, with_loras = both_sides(drawn)
    check_same(without, reference(base, PROMPTS))
    check_equal(with_loras, reference(base, PROMPTS, with_loras_of(loras)))
    assert differ(without, with_loras) > 1
    with Image.open(tmp_path / "both" / "contact-sheet.png") as sheet:
        assert sheet.size[0] == 2 * 512 + 4


@pytest.mark.slow
def test_what_peft_cannot_hold_is_merged(
    base: Path, loras: tuple[Path, Path], tmp_path: Path
) -> None:
    """A LoHa on the UNet and a text encoder, beside a LoRA: with it and without it, on a device
    that holds one model at a time; and merged by export."""
    torch.manual_seed(3)
    unet_key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    text_key = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    factors = {
        f"{key}.hada_w{number}_{side}": torch.randn((width, 4) if side == "a" else (4, width)) / 2
        for key, width in ((unet_key, 64), (text_key, 32))
        for number in "12"
        for side in "ab"
    }
    path = tmp_path / "loha.safetensors"
    safetensors.torch.save_file(factors | {f"{unet_key}.alpha": torch.tensor(2.0)}, path)

    def merged(pipeline: Any) -> None:
        layer = pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
        modules = pipeline.text_encoder.named_modules()
        text = next(module for name, module in modules if name.endswith("0.self_attn.q_proj"))
        for key, module, scale in ((unet_key, layer, 2 / 4), (text_key, text, 1)):
            a, b, c, d = (factors[f"{key}.hada_w{item}"] for item in ("1_a", "1_b", "2_a", "2_b"))
            module.weight.data += 0.8 * scale * (a @ b) * (c @ d)

    def both(pipeline: Any) -> None:
        merged(pipeline)
        pipeline.load_lora_weights(str(loras[0]), adapter_name="a")
        pipeline.set_adapters(["a"], [0.5])

    uses = (LoraUse(path, 0.8), LoraUse(loras[0], 0.5))
    out = tmp_path / "both"
    drawn = draw(base, out, PROMPTS, lora=uses, compare=True, low_memory=True)
    without, with_loras = both_sides(drawn)
    check_same(without, reference(base, PROMPTS))
    check_equal(with_loras, reference(base, PROMPTS, both))
    assert differ(without, with_loras) > 1
    with pytest.warns(UserWarning, match="again: .*weights"):
        alone = draw(base, tmp_path / "both", PROMPTS, lora=(LoraUse(path, 0.8),))
    check_equal(alone, reference(base, PROMPTS, merged))
    complete = tmp_path / "merged.safetensors"
    settings = {"weight": 0.8, "dtype": "fp32", "merge": True}
    export(ExportSettings(weights=path, out=complete, base=str(base), **settings))
    check_same(draw(complete, tmp_path / "whole", PROMPTS, tokenizers=base), alone)


@pytest.mark.slow
def test_compare_with_a_whole_unet(
    base: Path, cache: Path, loras: tuple[Path, Path], tmp_path: Path
) -> None:
    """With a UNet the other side is the base's; with a LoRA on it, the UNet without the LoRA."""
    out = tmp_path / "run"
    run(cache, base, out, full=True, lr=1e-3, steps=3, checkpoint_every=Every(2))

    def replace(pipeline: Any) -> None:
        pipeline.unet = UNet2DConditionModel.from_pretrained(str(out / "unet"))

    def both(pipeline: Any) -> None:
        replace(pipeline)
        pipeline.load_lora_weights(str(loras[0]))

    tuned = reference(base, PROMPTS, replace)
    drawn = draw(base, tmp_path / "unet", PROMPTS, unet=out, compare=True)
    without, with_unet = both_sides(drawn)
    check_same(without, reference(base, PROMPTS))
    check_same(with_unet, tuned)
    drawn = draw(
        base, tmp_path / "lora", PROMPTS, unet=out, lora=(LoraUse(loras[0]),), compare=True
    )
    without, with_both = both_sides(drawn)
    check_same(without, tuned)
    check_equal(with_both, reference(base, PROMPTS, both))
    early = draw(base, tmp_path / "early", PROMPTS, unet=out / "checkpoints" / "checkpoint-2")
    assert differ(early, tuned) > 0.1


@pytest.mark.slow
def test_checkpoints_and_their_averages(base: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(cache, base, out, steps=4, lr=3e-2, ema=0.9, checkpoint_every=Every(2))
    first, checkpoint = (out / "checkpoints" / f"checkpoint-{step}" for step in (2, 4))
    last = draw(base, tmp_path / "last", PROMPTS, lora=(LoraUse(checkpoint),), ema=False)
    check_same(last, draw(base, tmp_path / "file", PROMPTS, lora=(LoraUse(checkpoint / LORA),)))
    early = draw(base, tmp_path / "early", PROMPTS, lora=(LoraUse(first),), ema=False)
    assert differ(early, last) > 0.1
    average = draw(base, tmp_path / "average", PROMPTS, lora=(LoraUse(checkpoint),))
    check_same(average, draw(base, tmp_path / "run-drawn", PROMPTS, lora=(LoraUse(out),)))
    assert differ(last, average) > 0.1
    with pytest.raises(ValueError, match=r"--ema: .*run has no ema/; give the checkpoint of a run"):
        draw(base, tmp_path / "x", PROMPTS, lora=(LoraUse(out),), ema=True)


def test_what_goes_where_is_said(base: Path, tmp_path: Path) -> None:
    (tmp_path / "full" / "unet").mkdir(parents=True)
    (tmp_path / "full" / "unet" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="full: holds a whole UNet and no LoRA; give it as --unet"):
        draw(base, tmp_path / "out", PROMPTS, lora=(LoraUse(tmp_path / "full"),))
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / LORA).write_bytes(b"")
    with pytest.raises(ValueError, match="lora: holds a LoRA and no whole UNet; give it as --lora"):
        draw(base, tmp_path / "out", PROMPTS, unet=tmp_path / "lora")
    for name in ("compare", "ema"):
        with pytest.raises(ValueError, match=f"--{name} needs --lora or --unet"):
            GenerateSettings(base="x", out=tmp_path, prompt="a", **{name: True})


def test_loras_of_different_schedules_do_not_go_together(base: Path, tmp_path: Path) -> None:
    unet = made_lora(base, tmp_path / "unused", targets="attention-out", rank=2)
    uses = []
    for kind in ("epsilon", "v_prediction"):
        path = tmp_path / f"{kind}.safetensors"
        path.write_bytes(lora_bytes(unet, model_metadata=ModelMetadata(prediction_type=kind))[LORA])
        uses.append(LoraUse(path))
    with pytest.raises(
        ValueError, match=r"epsilon.safetensors was trained for epsilon .*: they do not go"
    ):
        draw(base, tmp_path / "out", PROMPTS, lora=tuple(uses))


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [("a.safetensors", "a.safetensors", 1), ("a,b.st,0.5", "a,b.st", 0.5), ("x,-1", "x", -1)],
)
def test_a_weight_follows_the_comma(text: str, path: str, weight: float) -> None:
    assert LoraUse.parse(text) == LoraUse(Path(path), weight)
    assert LoraUse.parse(str(LoraUse.parse(text))) == LoraUse.parse(text)


@pytest.mark.parametrize("text", ["a,half", "a,", "a,nan", "a,inf", ",1"])
def test_a_weight_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no number|must be FILE or FILE,WEIGHT"):
        LoraUse.parse(text)


def test_all_that_decides_an_image_is_in_its_record(base: Path, tmp_path: Path) -> None:
    """Also what the base says of the unconditional, and how the side without LoRA is sampled."""
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    made_lora(folder, tmp_path)
    use = (LoraUse(tmp_path / LORA),)
    settings = GenerateSettings(
        base=str(folder), out=tmp_path / "out", prompt="a", lora=use, compare=True
    )

    def record() -> Any:
        requests = make_requests(settings, [parse_prompt("a")], 64)
        return _provenance(make_pipeline(settings), requests)

    first = record()
    assert record() == first
    path = folder / "scheduler" / "scheduler_config.json"
    before = path.read_text()
    output = json.loads(before)
    path.write_text(json.dumps(output | {"prediction_type": "v_prediction"}))
    second = record()  # the LoRA says for itself what it predicts
    assert second["samplers"] != first["samplers"] and second["weights"] == first["weights"]
    path.write_text(before)
    assert record() == first
    index = folder / "model_index.json"
    output = json.loads(index.read_bytes()) | {"force_zeros_for_empty_prompt": False}
    index.write_text(json.dumps(output))
    assert record()["weights"] != first["weights"]
