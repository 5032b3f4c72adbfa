"""``download`` takes what a base needs, and nothing else, and goes on where it broke off."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sdxl import BaseError
from sdxl.base import open_base
from sdxl.hub import pick_files
from sdxl.load import load_unet
from tests.hub import NEXT_REVISION, REPO, REVISION, Hub, serve

ROOT = Path(__file__).parent.parent
UNET = "unet/diffusion_pytorch_model.safetensors"
SURPLUS = (
    "README.md",
    "sd_xl_base_1.0.safetensors",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_flax_model.msgpack",
    "unet/model.onnx",
    "unet/openvino_model.xml",
    "vae_1_0/diffusion_pytorch_model.safetensors",
    "vae_decoder/config.json",
)


@pytest.fixture
def hub(base: Path, tmp_path: Path) -> Iterator[Hub]:
    folder = shutil.copytree(base, tmp_path / "hub")
    for name in SURPLUS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not to be had")
    with serve(folder) as first:
        yield first


def download(hub: Hub, out: Path, *more: str, repo: str = REPO) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(out.parent / "hf"),
    }
    command = [sys.executable, "cli.py", "download", repo, "--out", str(out), *more]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def refused(run: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in run.stderr.splitlines() if line.startswith("Error: ")]
    assert run.returncode == 2, run.stderr
    assert len(lines) == 1 and "Traceback" not in run.stderr, run.stderr
    return lines[0]


def test_it_takes_what_a_base_needs(hub: Hub, base: Path, tmp_path: Path) -> None:
    run = download(hub, tmp_path / "out")
    assert run.returncode == 0, run.stderr
    assert f"--base {tmp_path / 'out'}" in run.stdout
    assert files(tmp_path / "out") == files(base)
    assert files(tmp_path / "out").keys() == set(hub.requests)
    hub.requests.clear()
    assert download(hub, tmp_path / "out").returncode == 0
    assert hub.requests == []


def test_a_revision_is_taken_where_one_is_named(hub: Hub, base: Path, tmp_path: Path) -> None:
    hub.next_folder, hub.branch = tmp_path / "nothing", NEXT_REVISION
    run = download(hub, tmp_path / "out", repo=f"{REPO}@{REVISION}")
    assert run.returncode == 0, run.stderr
    assert files(tmp_path / "out") == files(base)


def test_a_broken_connection_is_tried_again(hub: Hub, base: Path, tmp_path: Path) -> None:
    hub.cut[UNET] = 100_000
    run = download(hub, tmp_path / "out")
    assert run.returncode == 0, run.stderr
    assert hub.requests.count(UNET) == 2
    assert files(tmp_path / "out") == files(base)


def test_what_is_whole_is_kept(hub: Hub, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    hub.lost = UNET
    line = refused(download(hub, out))
    assert f"{REPO}: not whole in {out}, run again to go on" in line
    assert "unet" not in {path.split("/")[0] for path in files(out) if path.endswith("tensors")}
    hub.requests.clear()
    hub.lost = ""
    assert download(hub, out).returncode == 0
    assert UNET in hub.requests
    assert not set(hub.requests) & {"vae/config.json", "model_index.json"}
    assert files(out) == files(base)
    assert not list(out.rglob("*.incomplete"))
    load_unet(open_base(out).unet, torch.float32)


def test_fp16_files_where_they_are_asked_for(hub: Hub, tmp_path: Path) -> None:
    for part, stem in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        shutil.copy(
            hub.folder / part / f"{stem}.safetensors",
            hub.folder / part / f"{stem}.fp16.safetensors",
        )
    assert download(hub, tmp_path / "out", "--fp16").returncode == 0
    results = {name for name in files(tmp_path / "out") if name.endswith(".safetensors")}
    assert results == {
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/model.fp16.safetensors",
        "text_encoder_2/model.safetensors",
    }


def test_what_cannot_be_had_gets_one_line(hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "nobody/nothing: could not be downloaded from the hub" in refused(
        download(hub, out, repo="nobody/nothing")
    )
    assert "not-an-id: no hub id" in refused(download(hub, out, repo="not-an-id"))
    (tmp_path / "file").write_text("")
    assert "file: not a folder" in refused(download(hub, tmp_path / "file"))
    assert not out.exists()


def test_one_file_of_a_repository(hub: Hub, tmp_path: Path) -> None:
    run = download(hub, tmp_path / "out", "--file", "sd_xl_base_1.0.safetensors")
    assert run.returncode == 0, run.stderr
    assert files(tmp_path / "out") == {"sd_xl_base_1.0.safetensors": b"not to be had"}
    assert f"--base {tmp_path / 'out' / 'sd_xl_base_1.0.safetensors'}" in run.stdout


def test_pick_files() -> None:
    singles = ["README.md", "a.safetensors", "b.safetensors", "c.ckpt"]
    with pytest.raises(BaseError, match=r"name one .* \(found: a.safetensors, b.safetensors\)"):
        pick_files("o/n", singles, False, None)
    assert pick_files("o/n", singles, False, "b.safetensors") == ["b.safetensors"]
    assert pick_files("o/n", singles[:2], False, None) == ["a.safetensors"]
    for wrong in ("c.ckpt", "d.safetensors"):
        with pytest.raises(BaseError, match=f"has no {wrong} in safetensors"):
            pick_files("o/n", singles, False, wrong)
    parts = [f"{part}/config.json" for part in ("unet", "vae", "text_encoder", "text_encoder_2")]
    complete = ["model_index.json", *parts]
    with pytest.raises(BaseError, match=r"its unet has no safetensors \(found: unet/model.bin\)"):
        pick_files("o/n", [*complete, "unet/model.bin"], False, None)
    weights = [path.replace("config.json", "model.fp16.safetensors") for path in parts[1:]]
    numbered = [f"unet/diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    numbered.append("unet/diffusion_pytorch_model.safetensors.index.json")
    assert set(pick_files("o/n", [*complete, *weights, *numbered], False, None)) == {
        *complete,
        *weights,
        *numbered,
    }
