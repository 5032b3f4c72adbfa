"""``doctor``: what is found on a machine, and what it says to do."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import cli_doctor
from cli import commands
from cli_doctor import Finding, examine


def findings(folder: Path, base: str | None = None) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine(folder, base)}


def device_of(folder: Path) -> Finding:
    return findings(folder)["device"]


def test_a_machine_that_will_do(tmp_path: Path) -> None:
    seen = findings(tmp_path, "miniature")
    assert {"python", "packages", "device", "memory", "disk", "locks", "hub", "base"} <= set(seen)
    assert all(finding.state != "fail" for finding in seen.values()), seen
    assert torch.__version__ in seen["packages"].value
    assert "64 pixels" in seen["base"].value
    assert list(tmp_path.iterdir()) == []  # what was tried is gone
    for finding in seen.values():
        assert finding.state == "ok" or finding.remedy


def test_what_is_needed_and_lacks_is_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str | None:
        return {"peft": None, "webdataset": "0.2.1"}.get(name, real(name))

    real = cli_doctor._version
    monkeypatch.setattr(cli_doctor, "_version", version)
    result = CliRunner().invoke(commands, ["doctor", "--folder", str(tmp_path)])
    assert result.exit_code == 1
    line = next(line for line in result.output.splitlines() if line.startswith("fail"))
    assert "peft is not installed" in line and "webdataset 0.2.1 is not" in line
    assert "make setup" in result.output
    assert "disk" in result.output  # the rest is still looked at


def test_a_driver_without_a_torch_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_doctor, "has_nvidia_driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    device = findings(tmp_path)["device"]
    assert device.state == "fail" and "CUDA" in device.remedy


def test_a_gpu_is_described_and_computes(cuda: Any, tmp_path: Path) -> None:
    for (major, minor), precision in (((8, 0), "bfloat16"), ((7, 5), "float16")):
        device = cuda(device_of, tmp_path, major=major, minor=minor)
        assert device.state == "ok", device
        assert f"compute capability {major}.{minor}" in device.value
        assert device.value.endswith(f"computes in {precision}")


def test_a_device_that_computes_wrongly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *more: real(tensor, *more) * 1.1)
    finding = cli_doctor._computes(torch.device("cpu"), "cpu")
    assert finding.state == "fail" and "cannot be trusted" in finding.remedy


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert findings(tmp_path)["disk"].state == "fail"


def test_folders_and_bases_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = findings(tmp_path / "none", "minature")
    assert seen["disk"].state == "fail" and "--folder" in seen["disk"].remedy
    assert seen["base"].state == "fail" and "did you mean miniature?" in seen["base"].value
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    assert "make room" in findings(tmp_path)["disk"].remedy
