"""What a run tells: a bar, ``metrics.jsonl``, and W&B. All of it from the main rank alone.

Losses stay on the device until ``flush``: between two flushes the host never waits for the GPU.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from shards.durable import write_durable
from train.config import TrainConfig
from train.distributed import World

METRICS = "metrics.jsonl"
WANDB_ID = "wandb.json"


def cut_metrics(run: Path, last_step: int) -> None:
    """Drop the rows after ``last_step``, and a half-written one: they will come again."""
    path = run / METRICS
    if not path.exists():
        return
    kept = []
    for line in path.read_text("utf-8").splitlines():
        try:
            step = json.loads(line)["step"]
            if step <= last_step and last_step > 0:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_durable(path, "".join(kept).encode())


class RunLog:
    """Rows of numbers by step. ``close`` it, whatever happens."""

    def __init__(
        self, config: TrainConfig, world: World, start: int, num_steps: int, run_config: Any
    ) -> None:
        self.config, self.world = config, world
        self.skips_overflows = False  # a GradScaler leaves steps out whose gradients overflow
        self._pending: list[tuple[int, float, torch.Tensor, torch.Tensor, int]] = []
        self._since = time.perf_counter()
        self._wandb: Any = None
        self.bar: Any = tqdm(
            total=num_steps, initial=start, unit="step", desc="train", disable=not world.is_main
        )
        if world.is_main:
            cut_metrics(config.out, start)
            self._file = open(config.out / METRICS, "a", encoding="utf-8")  # noqa: SIM115
            if config.wandb != "disabled":
                self._wandb = _start_wandb(config, run_config)

    def step(
        self, step: int, lr: float, loss: torch.Tensor, grad_norm: torch.Tensor, num_samples: int
    ) -> None:
        """Note a step: ``loss`` is this rank's share of it, a scalar still on the device."""
        self._pending.append((step, lr, loss, grad_norm, num_samples))
        self.bar.update()

    def flush(self) -> None:
        """Write what is pending. Every rank must call it at the same step."""
        if not self._pending:
            return
        losses = self.world.sum(torch.stack([row[2] for row in self._pending]))
        values = torch.stack([losses, torch.stack([row[3] for row in self._pending])]).tolist()
        now = time.perf_counter()
        rate = sum(row[4] for row in self._pending) / max(now - self._since, 1e-9)
        rows: list[dict[str, Any]] = [
            {
                "step": step,
                "train/loss": _json(loss),
                "train/lr": lr,
                "train/grad_norm": _json(norm),
            }
            for (step, lr, _, _, _), loss, norm in zip(self._pending, *values, strict=True)
        ]
        rows[-1]["train/images_per_second"] = round(rate, 3)
        if self.world.device.type == "cuda":
            rows[-1]["gpu/peak_memory_bytes"] = torch.cuda.max_memory_allocated(self.world.device)
        mean = sum(values[0]) / len(rows)
        self.bar.set_postfix(loss=f"{mean:.4f}", img_s=f"{rate:.1f}")
        self._write(rows)
        self._pending, self._since = [], now
        if not self.skips_overflows:
            _check_finite(rows)

    def eval(self, step: int, loss: float) -> None:
        """Note an evaluation after ``step`` steps."""
        self._write([{"step": step, "eval/loss": loss}])
        self.say(f"step {step}: eval loss {loss:.5f}")
        self._since = time.perf_counter()

    def say(self, line: str) -> None:
        """One line above the bar."""
        if self.world.is_main:
            tqdm.write(line)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        if not self.world.is_main:
            return
        for row in rows:
            self._file.write(json.dumps(row) + "\n")
            if self._wandb is not None:
                self._wandb.log({"trainer/step": row["step"], **_without_step(row)})
        self._file.flush()

    def artifact(self, path: Path) -> None:
        """Upload the run's weights to W&B."""
        if self._wandb is None:
            return
        import wandb

        artifact = wandb.Artifact(f"weights-{self._wandb.id}", type="model")
        if path.is_dir():
            artifact.add_dir(str(path))
        else:
            artifact.add_file(str(path))
        self._wandb.log_artifact(artifact)

    def close(self) -> None:
        self.bar.close()
        if self.world.is_main:
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN


def _check_finite(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["train/loss"] is None or row["train/grad_norm"] is None:
            raise ValueError(
                f"step {row['step']}: the loss or its gradient is not finite; the run stops before "
                "that reaches a checkpoint. A smaller --lr may help, or --precision bf16 or fp32; "
                "--resume goes on from the last checkpoint"
            )


def _without_step(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "step"}


def _start_wandb(config: TrainConfig, run_config: Any) -> Any:
    """A new W&B run, or the same one where the run's folder names it."""
    import wandb

    path = config.out / WANDB_ID
    known = json.loads(path.read_text())["id"] if path.exists() else None
    try:
        run = wandb.init(
            project=config.wandb_project,
            dir=str(config.out),
            mode=config.wandb,
            id=known,
            resume="allow" if known else None,
            config=run_config,
            settings=wandb.Settings(silent=True),
        )
    except wandb.errors.Error as error:
        raise ValueError(f"--wandb {config.wandb}: {error}") from error
    run.define_metric("*", step_metric="trainer/step")
    path.write_text(json.dumps({"id": run.id}) + "\n")
    return run
