"""A flipped bit in weights that this program wrote is refused wherever they are read."""

import json
import struct
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from loras import made_lora
from made import learner_of
from safetensors import safe_open

from infer.export import export
from infer.export_settings import ExportSettings
from sdxl.base import ModelSource, open_base
from sdxl.load import load_unet
from sdxl.lora.apply import apply_loras, load_lora
from sdxl.lora.names import KOHYA, LORA
from sdxl.lora.read import read_lora_file
from sdxl.single_file import read_header
from sdxl.tensor_files import DTYPES, KEY, METADATA_KEY, check_digest, digest_metadata
from train.distributed import DistContext
from train.weights import sizes_of, tensor_files

CPU = torch.device("cpu")


def flip(path: Path, place: float = 0.5) -> None:
    """One bit of a tensor, that far into the file's data."""
    data = bytearray(path.read_bytes())
    start = 8 + struct.unpack("<Q", data[:8])[0]
    data[start + int(place * (len(data) - start - 1))] ^= 4
    path.write_bytes(data)


def rewritten(path: Path, tensors: dict[str, torch.Tensor], **changes: Any) -> None:
    """As another program writes it, which keeps the metadata it finds."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata()) | changes
    safetensors.torch.save_file(tensors, path, metadata=metadata)


def test_every_dtype_is_named_as_the_library_names_it(tmp_path: Path) -> None:
    tensors = {name: torch.ones(2, 3).to(dtype) for dtype, name in DTYPES.items()}
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, path)
    assert {name: item.dtype for name, item in read_header(path)[0].items()} == {
        n: n for n in tensors
    }
    rare = digest_metadata({"x": torch.ones(2, dtype=torch.complex64)}, {})
    assert rare.keys() == {METADATA_KEY}


def test_a_digest_is_of_the_tensors_alone_in_any_order(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "b": torch.randn(3, 5, generator=generator),
        "a": torch.randn(2, 1, 4, generator=generator).to(torch.bfloat16),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4, dtype=torch.float16),
        "ids": torch.arange(7),
    }
    stated = digest_metadata(tensors, {})
    assert stated == digest_metadata(dict(reversed(tensors.items())), {})
    assert stated != digest_metadata(tensors | {"b": tensors["b"].T}, {})
    assert stated != digest_metadata(tensors | {"scalar": torch.tensor(-3.0)}, {})
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, path, metadata=stated)
    check_digest(path)
    for place in (0.0, 0.3, 0.6, 1.0):
        flip(path, place)
        with pytest.raises(ValueError, match=r"x\.safetensors: damaged: its digest"):
            check_digest(path)
        flip(path, place)
    check_digest(path)
    check_digest(tmp_path / "nowhere")
    path.write_bytes(b"no safetensors")
    check_digest(path)


def test_what_the_metadata_says_is_under_a_digest_too(base: Path, tmp_path: Path) -> None:
    """One flipped bit makes a LoRA more than twice as strong."""
    made_lora(base, tmp_path)
    for name, (old, new) in {
        LORA: (b'lora_alpha\\": 32', b'lora_alpha\\": 72'),
        KOHYA: (b'ss_network_alpha":"32', b'ss_network_alpha":"72'),
    }.items():
        path = tmp_path / name
        data = path.read_bytes()
        assert old in data, data[:3000]
        path.write_bytes(data.replace(old, new, 1))
        with pytest.raises(ValueError, match=f"{name}: damaged: its digest differs"):
            read_lora_file(path)


@pytest.mark.parametrize("digest", ["", "0", "0" * 49])
def test_a_digest_of_another_form_is_damage(tmp_path: Path, digest: str) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(2)}, path, {KEY: digest})
    with pytest.raises(ValueError, match="damaged"):
        check_digest(path)


@pytest.mark.parametrize("name", [LORA, KOHYA])
def test_a_flipped_lora_is_refused_wherever_it_is_read(
    base: Path, tmp_path: Path, name: str
) -> None:
    made_lora(base, tmp_path)
    path, unet = tmp_path / name, load_unet(open_base(base).unet, torch.float32)
    read_lora_file(path)
    tensors = {n: t.clone() for n, t in safetensors.torch.load_file(path).items()}  # not mapped
    flip(path)
    settings = ExportSettings(weights=path, out=tmp_path / "out.safetensors", base=str(base))
    for read in (
        lambda: load_lora(unet, path),
        lambda: apply_loras(unet, [(path, 1.0)]),
        lambda: export(settings),
    ):
        with pytest.raises(ValueError, match=f"{name}: damaged: its digest"):
            read()
    rewritten(path, tensors, ss_tag="mine")  # others may add to the metadata
    read_lora_file(path)
    rewritten(path, {n: t.half() for n, t in tensors.items()})  # and so is a file made of ours
    read_lora_file(path)
    safetensors.torch.save_file(tensors, path)  # as those of earlier versions and other programs
    read_lora_file(path)


def test_a_flipped_unet_is_refused_in_any_of_its_files(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdxl.metadata import ModelMetadata

    learner = learner_of(base, full=True)
    monkeypatch.setattr("train.weights.MAX_FILE_BYTES", 1_000_000)
    folder = tmp_path / "unet"
    folder.mkdir()
    (folder / "config.json").write_text(learner.unet.to_json_string())
    tensors = dict(learner.unet.named_parameters())
    for write in tensor_files(
        "diffusion_pytorch_model",
        sizes_of(tensors),
        tensors.__getitem__,
        DistContext(CPU),
        cycle([0]),
        card=ModelMetadata(name="x"),
    ):
        write(folder)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 1
    load_unet(ModelSource("unet", folder), torch.float32)
    for path in files:
        flip(path)
        with pytest.raises(ValueError, match=f"{path.name}: damaged: its digest"):
            load_unet(ModelSource("unet", folder), torch.float32)
        flip(path)
    load_unet(ModelSource("unet", folder), torch.float32)


def test_a_flipped_export_is_refused(base: Path, tmp_path: Path) -> None:
    made_lora(base, tmp_path / "lora")
    for out, flipped in (
        ("one.safetensors", ""),
        ("two", "unet/diffusion_pytorch_model.safetensors"),
    ):
        settings = ExportSettings(
            weights=tmp_path / "lora", out=tmp_path / out, base=str(base), merge=True
        )
        export(settings)
        path = tmp_path / out / flipped
        with safe_open(path, framework="pt") as file:
            assert KEY in file.metadata()
            stated = file.metadata()[KEY]
        assert stated == digest_metadata(safetensors.torch.load_file(path), {})[KEY]
        flip(path, 0.9)
        with pytest.raises(ValueError, match="damaged: its digest"):
            if flipped:
                load_unet(ModelSource("unet", path.parent), torch.float16)
            else:
                load_unet(open_base(path).unet, torch.float16)


def test_bytes_are_the_same_in_every_file(base: Path, tmp_path: Path) -> None:
    """Several metadata keys come in one order."""
    for name in ("a", "b"):
        torch.manual_seed(3)
        made_lora(base, tmp_path / name)
    for name in (LORA, KOHYA):
        first, second = ((tmp_path / folder / name).read_bytes() for folder in ("a", "b"))
        assert first == second
        (length,) = struct.unpack("<Q", first[:8])
        keys = list(json.loads(first[8 : 8 + length])["__metadata__"])
        assert keys == sorted(keys) and KEY in keys
