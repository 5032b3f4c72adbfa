"""What an export takes along besides the weights themselves."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from loras import made_lora

from infer.export import export
from infer.export_settings import ExportSettings
from infer.settings import GenerateSettings, LoraUse
from infer.weights import Weights
from sdxl.base import open_base
from sdxl.load import load_vae
from sdxl.lora.names import KOHYA, LORA
from sdxl.lora.read import find_lora
from sdxl.lora.write import lora_bytes
from sdxl.metadata import ModelMetadata
from tools.random_base import make_random_base


def merged(base: Path, lora: Path, out: Path, dtype: str = "fp16") -> Path:
    settings: Any = {"base": str(base), "merge": True, "dtype": dtype}
    return export(ExportSettings(weights=lora, out=out, **settings)).path


def lora_with(base: Path, folder: Path, **card: Any) -> Path:
    unet = made_lora(base, folder)
    (folder / LORA).write_bytes(lora_bytes(unet, None, ModelMetadata(**card))[LORA])
    return folder / LORA


def chunks_of(out: Path, base: Path, **use: Any) -> int:
    settings = GenerateSettings(base=str(base), out=out, prompt="a", **use)
    return Weights(settings, open_base(base)).num_chunks


def test_long_captions(base: Path, tmp_path: Path) -> None:
    lora = lora_with(base, tmp_path, long_captions=3)
    assert chunks_of(tmp_path, base, lora=(LoraUse(lora),)) == 3
    folder = merged(base, lora, tmp_path / "folder")
    assert chunks_of(tmp_path, base, unet=folder) == 3
    file = merged(base, lora, tmp_path / "whole.safetensors")
    assert chunks_of(tmp_path, file) == 3
    again = tmp_path / "again.safetensors"  # of a UNet folder
    export(ExportSettings(weights=folder, out=again, base=str(base)))
    assert chunks_of(tmp_path, again) == 3
    assert chunks_of(tmp_path, base) == 1


def test_of_what_a_lora_does_not_say_the_base_decides(base: Path, tmp_path: Path) -> None:
    """As ``generate`` samples it, so the merged one is."""
    make_random_base(tmp_path / "base")
    path = tmp_path / "base" / "scheduler" / "scheduler_config.json"
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    path.write_text(json.dumps(json.loads(path.read_bytes()) | settings))
    lora = lora_with(tmp_path / "base", tmp_path, prediction_type="v_prediction")
    out = merged(tmp_path / "base", lora, tmp_path / "out.safetensors")
    result = open_base(out).scheduler_config
    assert {name: result[name] for name in settings} == settings


def test_a_vae_in_another_dtype_than_the_unet_keeps_its_bits(base: Path, tmp_path: Path) -> None:
    make_random_base(tmp_path / "base")
    path = tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    state = safetensors.torch.load_file(path)
    safetensors.torch.save_file({n: t.half() for n, t in state.items()}, path, {"format": "pt"})
    made_lora(tmp_path / "base", tmp_path)
    out = merged(tmp_path / "base", tmp_path / LORA, tmp_path / "out.safetensors", "fp32")
    expected = load_vae(open_base(tmp_path / "base").vae, torch.float32).state_dict()
    actual = load_vae(open_base(out).vae, torch.float32).state_dict()
    assert any(not torch.equal(t, t.half().float()) for t in expected.values())
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("name", [LORA, KOHYA])
def test_a_lora_in_eight_bits(base: Path, tmp_path: Path, name: str) -> None:
    made_lora(base, tmp_path)
    state = safetensors.torch.load_file(tmp_path / name)
    small = {
        n: t if n.endswith("alpha") else t.to(torch.float8_e4m3fn).contiguous()
        for n, t in state.items()
    }
    safetensors.torch.save_file(small, tmp_path / "eight.safetensors")
    settings = ExportSettings(
        weights=tmp_path / "eight.safetensors", out=tmp_path / "out.safetensors", base=str(base)
    )
    assert export(settings).description.startswith("diffusers" if name == KOHYA else "kohya")


def test_a_checkpoint_with_an_average_means_the_average(base: Path, tmp_path: Path) -> None:
    """In generate, export and --init-lora alike; the file itself is what was averaged."""
    checkpoint = tmp_path / "checkpoint-2"
    raw, average = checkpoint / LORA, checkpoint / "ema" / LORA
    average.parent.mkdir(parents=True)
    tensors = safetensors.torch.load_file(lora_with(base, checkpoint))
    safetensors.torch.save_file({name: 2 * value for name, value in tensors.items()}, average)
    assert find_lora(checkpoint) == average and find_lora(raw) == raw
    for ema, expected in ((None, average), (True, average), (False, raw)):
        settings = GenerateSettings(
            base=str(base), out=tmp_path, prompt="a", lora=(LoraUse(checkpoint),), ema=ema
        )
        assert Weights(settings, open_base(base)).loras == [(expected, 1.0)]
    of = {
        path: export(
            ExportSettings(weights=path, out=tmp_path / f"{number}.safetensors", base=str(base))
        )
        for number, path in enumerate((checkpoint, average, raw))
    }
    written = {path: safetensors.torch.load_file(file.path) for path, file in of.items()}
    assert all(torch.equal(written[checkpoint][k], v) for k, v in written[average].items())
    assert any(not torch.equal(written[checkpoint][k], v) for k, v in written[raw].items())
