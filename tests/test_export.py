"""Exports: what other tools read is what was trained, to the bit; and a wrong one is never left."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from loras import (
    assert_close,
    fused,
    fused_by_diffusers,
    lora_factors,
    made_lora,
    num_changed,
    text_lora,
)
from runs import run as train
from safetensors import safe_open

import cli
import infer.export
import infer.export_model
from infer.export import export
from infer.export_settings import ExportSettings
from sdxl.base import ModelSource, open_base
from sdxl.load import load_text_encoders, load_unet, load_vae
from sdxl.lora.apply import load_lora
from sdxl.lora.names import KOHYA, LORA, UNET
from sdxl.lora.read import read_lora_file
from sdxl.metadata import read_model_metadata
from shards.reader import Cache
from tools.random_base import make_random_base

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.fixture(scope="module")
def licensed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with a model card that states a license."""
    folder = tmp_path_factory.mktemp("licensed") / "some-base"
    shutil.copytree(base, folder)
    card = "---\ntags: [a]\nlicense: other\nlicense_name: fair-ai\n---\nlicense: not this\n"
    (folder / "README.md").write_text(card)
    return folder


def do(weights: Path, out: Path, **settings: Any) -> Path:
    return export(ExportSettings(weights=weights, out=out, **settings)).path


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def test_a_run_writes_both_files_and_they_say_what_they_are(
    licensed: Path, cache: Path, tmp_path: Path
) -> None:
    out = tmp_path / "hearts"
    train(cache, licensed, out, steps=3, rank=4, alpha=2.0, checkpoint_at=(2,))
    both = [read_lora_file(out / name) for name in (LORA, KOHYA)]
    assert [file.kind for file in both] == ["diffusers", "kohya"]
    for file in both:
        card = file.model_metadata
        assert (card.name, card.base, card.license) == ("hearts", "some-base", "fair-ai")
        assert card.caches == (Cache(cache).data_digest,)
        assert (card.steps, card.rank, card.alpha) == (3, 4, 2.0)
        assert (card.prediction_type, card.rescale_betas_zero_snr) == ("epsilon", False)
    buckets = json.loads(metadata_of(out / KOHYA)["ss_bucket_info"])["buckets"].values()
    assert sorted((*bucket["resolution"], bucket["count"]) for bucket in buckets) == list(
        card.buckets
    )
    assert sum(bucket["count"] for bucket in buckets) == 14 and len(buckets) == 3
    first, second = (file.parts[UNET] for file in both)
    assert len(first) == len(second) > 30
    deltas = [
        sorted(float(o.delta().double().norm()) for o in file.values()) for file in (first, second)
    ]
    assert deltas[0] == pytest.approx(deltas[1]) and deltas[0][0] > 0
    early = out / "checkpoints" / "checkpoint-2"
    assert (
        read_lora_file(early).model_metadata.steps
        == read_lora_file(early / KOHYA).model_metadata.steps
        == 2
    )
    assert not list(out.rglob("*.partial"))


def test_full_weights_say_what_they_are(licensed: Path, cache: Path, tmp_path: Path) -> None:
    train(cache, licensed, tmp_path / "run", steps=2, full=True)
    for name in ("diffusion_pytorch_model", "diffusion_pytorch_model.fp16"):
        metadata = metadata_of(tmp_path / "run" / "unet" / f"{name}.safetensors")
        card = read_model_metadata(metadata)
        assert metadata["format"] == "pt"
        assert (card.name, card.steps, card.rank, card.license) == ("run", 2, None, "fair-ai")


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 8, "alpha": 3.0, "adapter": "rslora"},
        pytest.param({"rank": 4, "alpha": 16.0, "conv": True}, marks=pytest.mark.slow),
        {"rank": 4, "alpha": 16.0, "adapter": "dora"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:this is a DoRA")
def test_to_kohya_and_back_is_the_same_adapter(
    base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    unet = made_lora(base, tmp_path, targets="all", **settings)
    kohya = do(tmp_path, tmp_path / "there.safetensors", base=str(base))
    back = do(kohya, tmp_path / "back.safetensors", base=str(base))
    assert [read_lora_file(path).kind for path in (kohya, back)] == ["kohya", "diffusers"]
    actual = safetensors.torch.load_file(tmp_path / LORA)
    again = safetensors.torch.load_file(back)
    assert actual.keys() == again.keys() and all(torch.equal(actual[n], again[n]) for n in actual)
    third = do(back, tmp_path / "third.safetensors", base=str(base))
    first, second = (safetensors.torch.load_file(path) for path in (kohya, third))
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
    scale = read_lora_file(tmp_path).parts[UNET][next(iter(lora_factors(unet)))].scale
    assert_close(fused_by_diffusers(base, back), fused(base, unet, scale))


@pytest.mark.parametrize("dtype", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_text_encoders_and_precisions_go_along(base: Path, tmp_path: Path, dtype: str) -> None:
    made_lora(base, tmp_path, rank=4, alpha=16.0)
    both = safetensors.torch.load_file(tmp_path / KOHYA) | text_lora(2, 8.0, (32, 48))
    metadata = {"ss_steps": "1200", "modelspec.license": "mine"}
    safetensors.torch.save_file(both, tmp_path / "both.safetensors", metadata)
    out = do(
        tmp_path / "both.safetensors", tmp_path / "out.safetensors", base=str(base), dtype=dtype
    )
    back = do(out, tmp_path / "back.safetensors", base=str(base))
    state, card = safetensors.torch.load_file(back), read_lora_file(back).model_metadata
    assert state.keys() == both.keys()
    for name, tensor in both.items():
        expected = tensor if name.endswith(".alpha") else tensor.to(DTYPES[dtype])
        assert torch.equal(state[name], expected), name
    assert (card.steps, card.license, card.name) == (1200, "mine", "back")
    pipeline = StableDiffusionXLPipeline.from_pretrained(str(base))
    pipeline.load_lora_weights(str(out))
    assert pipeline.get_list_adapters().keys() == {"unet", "text_encoder", "text_encoder_2"}
    scales = {
        module.scaling["default_0"]
        for module in pipeline.text_encoder.modules()
        if hasattr(module, "lora_A")
    }
    assert scales == {8 / 2}


@pytest.mark.parametrize("dtype", ["fp16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_a_fine_tuned_unet_becomes_one_file(
    base: Path, cache: Path, tmp_path: Path, dtype: str
) -> None:
    v = {"prediction_type": "v_prediction", "zero_terminal_snr": True}
    train(cache, base, tmp_path / "run", steps=2, full=True, lr=1e-2, **v)
    out = do(tmp_path / "run", tmp_path / "out.safetensors", base=str(base), dtype=dtype)
    kind = DTYPES[dtype]
    text_encoder, text_encoder_2 = load_text_encoders(open_base(base), kind)
    sources = {
        "unet": load_unet(ModelSource("unet", tmp_path / "run" / "unet"), kind),
        "vae": load_vae(open_base(base).vae, kind),
        "text_encoder": text_encoder,
        "text_encoder_2": text_encoder_2,
    }
    first, second = load_text_encoders(open_base(out), kind)
    results = {
        "unet": load_unet(open_base(out).unet, kind),
        "vae": load_vae(open_base(out).vae, kind),
        "text_encoder": first,
        "text_encoder_2": second,
    }
    for name, model in sources.items():
        expected, state = model.state_dict(), results[name].state_dict()
        assert expected.keys() == state.keys()
        assert all(torch.equal(state[n], tensor) for n, tensor in expected.items())
    assert num_changed(results["unet"].float().state_dict(), base) > 30
    config = open_base(out).scheduler_config
    assert config["prediction_type"] == "v_prediction" and config["rescale_betas_zero_snr"] is True
    tensors = safetensors.torch.load_file(out)
    assert {"v_pred", "ztsnr"} <= tensors.keys()
    assert {t.dtype for t in tensors.values() if t.numel()} == {kind}
    metadata = metadata_of(out)
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert metadata["modelspec.prediction_type"] == "v" and metadata["modelspec.title"] == "out"
    assert read_model_metadata(metadata).steps == 2
    reference = UNet2DConditionModel.from_single_file(
        str(out), config=str(base), subfolder="unet", torch_dtype=kind, local_files_only=True
    ).state_dict()
    assert all(torch.equal(reference[n], t) for n, t in sources["unet"].state_dict().items())


@pytest.mark.parametrize(
    ("settings", "strength"),
    [
        ({"rank": 8, "alpha": 3.0, "adapter": "rslora", "conv": True}, 0.6),
        ({"rank": 4, "alpha": 16.0, "adapter": "dora", "conv": True}, 1.0),
    ],
    ids=["rslora", "dora"],
)
def test_a_merged_lora_is_what_the_adapter_draws(
    base: Path, tmp_path: Path, settings: dict[str, Any], strength: float
) -> None:
    unet = made_lora(base, tmp_path, targets="all", **settings)
    common: dict[str, Any] = {"base": str(base), "merge": True, "weight": strength, "dtype": "fp32"}
    scale = strength * (3 / 8**0.5 if settings["adapter"] == "rslora" else 16 / 4)
    expected = fused(base, unet, scale)
    out = do(tmp_path, tmp_path / "merged.safetensors", **common)
    assert_close(load_unet(open_base(out).unet, torch.float32).state_dict(), expected)
    folder = do(tmp_path / KOHYA, tmp_path / "merged", **common)
    assert sorted(path.name for path in folder.iterdir()) == ["scheduler", "unet"]
    reference = UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()
    assert_close(reference, expected)
    assert num_changed(reference, base) == len(lora_factors(unet)) > 40
    half = load_unet(
        open_base(
            str(
                do(
                    tmp_path,
                    tmp_path / "half.safetensors",
                    base=str(base),
                    merge=True,
                    weight=strength,
                )
            )
        ).unet,
        torch.float16,
    )
    assert all(
        torch.allclose(t.float(), expected[n], atol=2e-3) for n, t in half.state_dict().items()
    )


def test_a_merge_has_the_text_encoders_parts_and_another_vae(base: Path, tmp_path: Path) -> None:
    both = text_lora(2, 8.0, (32, 48))
    path = tmp_path / "text.safetensors"
    safetensors.torch.save_file(both, path)
    make_random_base(tmp_path / "other", seed=1)
    common: dict[str, Any] = {"base": str(base), "merge": True, "dtype": "fp32"}
    out = do(path, tmp_path / "out.safetensors", vae=str(tmp_path / "other" / "vae"), **common)
    other = load_vae(open_base(tmp_path / "other").vae, torch.float32).state_dict()
    written = load_vae(open_base(out).vae, torch.float32).state_dict()
    assert all(torch.equal(written[name], tensor) for name, tensor in other.items())
    plain = load_text_encoders(open_base(base), torch.float32)
    for number, (item, merged) in enumerate(
        zip(plain, load_text_encoders(open_base(out), torch.float32), strict=True), 1
    ):
        for name, tensor in merged.state_dict().items():
            key = f"lora_te{number}_" + f"text_model.{name.removeprefix('text_model.')}".replace(
                ".", "_"
            )
            key = key.removesuffix("_weight")
            expected = item.state_dict()[name]
            if f"{key}.alpha" in both:
                up, down = both[f"{key}.lora_up.weight"], both[f"{key}.lora_down.weight"]
                expected = expected + 4 * up @ down
                both.pop(f"{key}.alpha")
            assert torch.allclose(tensor, expected, atol=1e-6), name
    assert not [name for name in both if name.endswith("alpha")]
    with pytest.warns(
        UserWarning, match=r"4 modules of the text encoders .* is not in a UNet folder"
    ):
        do(path, tmp_path / "out", **common)


def test_what_is_written_wrongly_is_not_kept(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A strength, a weight, or one tensor of the file."""
    made_lora(base, tmp_path, rank=4, alpha=16.0, targets="all")
    out = tmp_path / "out.safetensors"
    real = infer.export.kohya_bytes

    def weaker(parts: Any, config: Any, card: Any) -> bytes:
        state = safetensors.torch.load(real(parts, config, card))
        name = next(name for name in state if name.endswith(".alpha"))
        return safetensors.torch.save(state | {name: state[name] * 1.01})

    write = infer.export_model.write_original

    def flipped(path: Path, *arguments: Any, **more: Any) -> None:
        write(path, *arguments, **more)
        data = bytearray(path.read_bytes())
        data[-1000] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(infer.export, "kohya_bytes", weaker)
    monkeypatch.setattr(infer.export_model, "write_original", flipped)
    before = sorted(tmp_path.iterdir())
    for settings in ({}, {"merge": True}):
        with pytest.raises(OSError, match=r"out.safetensors: what was read back is not what was"):
            do(tmp_path, out, base=str(base), **settings)
        assert sorted(tmp_path.iterdir()) == before


def test_refusals(base: Path, tmp_path: Path) -> None:
    made_lora(base, tmp_path, rank=4, alpha=16.0)
    shutil.copytree(base / "unet", tmp_path / "full" / "unet")
    differences = {"lora_unet_input_blocks_3_0_in_layers_2.diff": torch.ones(32, 16, 3, 3)}
    safetensors.torch.save_file(differences, tmp_path / "full.st")
    out = tmp_path / "out.safetensors"
    out.write_text("mine")
    common: dict[str, Any] = {"base": str(base)}
    merge: dict[str, Any] = {**common, "merge": True}
    for weights, where, settings, message in (
        (tmp_path, out, common, r"out.safetensors: is there already; --overwrite"),
        (tmp_path, tmp_path / "x.safetensors", {}, r"does not fit .* --base says what it is of"),
        (tmp_path, tmp_path / "x.ckpt", common, r"x.ckpt: must end in .safetensors"),
        (tmp_path, tmp_path / "no" / "x.safetensors", common, "its folder does not exist"),
        (tmp_path, tmp_path / "x.safetensors", {"merge": True}, "--merge needs --base"),
        (tmp_path, tmp_path / "x.safetensors", {"weight": 0.5, **common}, "--weight is of --merge"),
        (tmp_path / "full", tmp_path / "x.safetensors", {}, "a UNet needs --base"),
        (
            tmp_path / "full",
            tmp_path / "x.safetensors",
            merge,
            "a whole UNet; --merge takes a LoRA",
        ),
        (tmp_path / LORA, tmp_path / LORA, common, "is what is to be exported"),
        (tmp_path / "full.st", tmp_path / "x.safetensors", {}, "full.st: holds full differences"),
        (tmp_path / "none", tmp_path / "x.safetensors", common, "none: no such LoRA file"),
        (tmp_path, tmp_path / "full", merge, r"full/unet: is there already"),
    ):
        with pytest.raises(ValueError, match=message):
            do(weights, where, **settings)
    assert out.read_text() == "mine"
    do(tmp_path, out, overwrite=True, **common)
    assert read_lora_file(out).kind == "kohya"


def test_beyond_fp16_is_refused(base: Path, tmp_path: Path) -> None:
    made_lora(base, tmp_path, rank=4, alpha=16.0)
    state = safetensors.torch.load_file(tmp_path / KOHYA)
    name = next(name for name in state if name.endswith("lora_up.weight"))
    state[name] *= 1e6
    safetensors.torch.save_file(state, tmp_path / "large.safetensors")
    out, common = tmp_path / "out.safetensors", {"base": str(base), "dtype": "fp16"}
    with pytest.raises(ValueError, match=r"are not finite; try --dtype fp32"):
        do(tmp_path / "large.safetensors", out, **common)
    with pytest.raises(ValueError, match=r"unet: .* is not finite in float16"):
        do(tmp_path / "large.safetensors", out, merge=True, **common)
    assert not out.exists()


def test_the_command(base: Path, tmp_path: Path) -> None:
    made_lora(base, tmp_path, rank=4, alpha=16.0)
    out = tmp_path / "for-ui.safetensors"
    arguments = ["export", str(tmp_path), "--base", str(base), "--out", str(out)]
    result = CliRunner().invoke(cli.commands, arguments)
    assert result.exit_code == 0, result.output
    assert f"{out}: kohya LoRA of " in result.output and "rank 4, alpha 16, " in result.output
    assert metadata_of(out)["ss_output_name"] == "for-ui"
    unet = load_unet(open_base(base).unet, torch.float32)
    load_lora(unet, out)
    again = CliRunner().invoke(cli.commands, arguments)
    assert again.exit_code == 2 and "is there already" in again.output
    assert json.loads(metadata_of(out)["shardtune"])["rank"] == 4
