"""A run's folder made by hand, without training."""

import json
import math
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from runtime.files import canonical_json, seal

SETTINGS: dict[str, Any] = {
    "caches": ["cats,repeats=10", "prior,weight=0.5"],
    "base": "miniature",
    "out": "run",
    "epochs": 16.0,
    "steps": None,
    "lr": 1e-3,
    "rank": 8,
    "alpha": 32.0,
    "targets": "attention",
    "batch_size": 8,
    "optimizer": "adamw",
    "ema": 0.99,
    "eval_every": "2ep",
    "checkpoint_at": [],
    "min_snr_gamma": 5.0,
    "gradient_checkpointing": False,
    "resume": True,
    "num_steps": 144,
    "steps_per_epoch": 9,
    "resolved_prediction_type": "epsilon",
}
QUARTERS = (0.02, 0.05, 0.1, 0.2)


def make_run(folder: Path, num_steps: int = 144, **settings: Any) -> Path:
    """A run with a row a step, evals and checkpoints at every 36th, and a sheet at each eval."""
    (folder / "previews").mkdir(parents=True)
    write_settings(folder, **settings)
    rows: list[dict[str, Any]] = [{"step": 0, "eval/loss": eval_at(0)}]
    for step in range(1, num_steps + 1):
        rows.append(train_row(step))
        if step % 10 == 0:
            rows[-1] |= {f"train/loss_quarter_{n}": q for n, q in enumerate(QUARTERS, 1)}
            rows[-1] |= {"train/images_per_second": 2.5, "train/data_wait_share": 0.01}
            rows[-1] |= {"train/peak_memory_bytes": 1_500_000_000}
        if step % 36 == 0:
            rows.append({"step": step, "eval/loss": eval_at(step)})
            write_checkpoint(folder, step)
            draw_sheet(folder / "previews" / f"step-{step:06d}.png", step)
    write_metrics(folder, rows)
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"weights")
    return folder


def eval_at(step: int) -> float:
    """It falls until step 108, and rises."""
    return round(0.15 - 0.05 * math.sin(math.pi * step / 216), 6)


def train_row(step: int) -> dict[str, Any]:
    loss = 0.15 - 0.0004 * step + 0.02 * math.sin(17.3 * step)
    row = {"step": step, "train/loss": loss, "train/lr": 1e-3, "train/grad_norm": 0.5 + loss}
    return {**row, "train/loss": None, "train/skipped": 1} if step == 50 else row


def write_settings(folder: Path, **settings: Any) -> None:
    text = canonical_json(seal({**SETTINGS, **settings}))
    (folder / "config.json").write_text(text)


def write_metrics(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_checkpoint(folder: Path, step: int) -> None:
    path = folder / "checkpoints" / f"checkpoint-{step}"
    path.mkdir(parents=True)
    state = {"step": step, "kind": "every", "eval_loss": eval_at(step)}
    (path / "state.json").write_text(canonical_json(seal(state)))


def draw_sheet(path: Path, step: int) -> None:
    image = Image.new("RGB", (512, 280), "white")
    ImageDraw.Draw(image).ellipse((20, 20, 40 + step, 40 + step), fill=(200, step % 256, 80))
    image.save(path)
