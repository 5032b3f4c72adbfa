"""Two processes train what one does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

ROOT = Path(__file__).parent.parent


def launch(cache: Path, base: Path, out: Path, processes: int, *more: str) -> None:
    """Run ``cli.py train``, under torchrun where there are several processes."""
    settings = ["--lr", "1e-3", "--device", "cpu", "--log-every", "3", *more]
    stage = ["cli.py", "train", str(cache), "--base", str(base), "--out", str(out), *settings]
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    run = subprocess.run([*python, *stage], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr


def train(cache: Path, base: Path, out: Path, processes: int, *more: str) -> list[float]:
    """The losses of ``launch``, in order: of 10 steps, and of the evaluations between."""
    launch(cache, base, out, processes, *more)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 11))
    return [row[name] for row in rows for name in ("train/loss", "eval/loss") if name in row]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_two_processes_have_the_losses_of_one(
    split_cache: Path, base: Path, tmp_path: Path, kind: str
) -> None:
    """10 steps are more than two epochs of uneven buckets: a rank often has less, or nothing."""
    more = ["--full"] if kind == "full" else ["--targets", "all"]
    more += ["--steps", "10", "--eval-every", "5"]
    one = train(split_cache, base, tmp_path / "1", 1, *more, "--batch-size", "4")
    two = train(split_cache, base, tmp_path / "2", 2, *more, "--batch-size", "2")
    assert len(one) == len(two) == 13
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) <= 1e-5
    name = {
        "lora": "pytorch_lora_weights.safetensors",
        "full": "unet/diffusion_pytorch_model.safetensors",
    }
    first = safetensors.torch.load_file(tmp_path / "1" / name[kind])
    second = safetensors.torch.load_file(tmp_path / "2" / name[kind])
    assert first.keys() == second.keys()
    for tensor, values in first.items():
        assert torch.allclose(values, second[tensor], atol=1e-3), tensor


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(
    split_cache: Path, base: Path, tmp_path: Path
) -> None:
    """The global batch stays: 2 x 2 samples become 1 process x 2 x 2 accumulated."""
    settings = ["--steps", "10", "--batch-size"]
    whole = train(split_cache, base, tmp_path / "1", 1, *settings, "4")
    out = tmp_path / "2"
    launch(split_cache, base, out, 2, "--steps", "4", "--batch-size", "2")
    mixed = train(split_cache, base, out, 1, *settings, "2", "--resume")
    assert json.loads((out / "config.json").read_text())["global_batch"] == 4
    # The stop after step 4 has an evaluation of its own.
    assert len(mixed) == len(whole) + 1
    del mixed[5]
    assert max(abs(a - b) for a, b in zip(whole, mixed, strict=True)) <= 1e-5
