"""Host time of an optimizer step over as many tensors as SDXL's UNet has, each dimension at most
2, so that hardly anything is computed: what is left is what the host does to issue the step.

On a CPU a foreach operation is a loop over its tensors, which is one kernel on a card; so what is
dispatched is counted too, and values that the host reads.

    python -m benchmarks.optimizer_step [--rounds 5] [--device cpu] [--out benchmark-output]
"""

import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click
import torch
from diffusers import UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.estimates import config_of
from benchmarks.full_base import CONFIGS
from benchmarks.report import keep, machine, show
from train.optim import Optimizer

PURE: dict[str, Any] = {"full": True, "pure_bf16": True}
RUNS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("bf16, adafactor", {**PURE, "optimizer": "adafactor"}),
    ("bf16, adamw", PURE),
    ("bf16, adamw8bit", {**PURE, "optimizer": "adamw8bit"}),
    ("fp32, adafactor", {"full": True, "optimizer": "adafactor"}),
    ("fp32, adamw8bit", {"full": True, "optimizer": "adamw8bit"}),
)


class Dispatched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations, and values that become Python's."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        is_read = function is torch.ops.aten._local_scalar_dense.default
        self.counts["reads" if is_read else "operations"] += 1
        return function(*args, **(kwargs or {}))


def small_parameters(dtype: torch.dtype, device: torch.device) -> dict[str, torch.nn.Parameter]:
    """SDXL's, each dimension at most 2."""
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(
            UNet2DConditionModel.load_config(str(CONFIGS / "unet"))
        )
    return {
        name: torch.nn.Parameter(
            torch.randn([min(size, 2) for size in p.shape], device=device).to(dtype)
        )
        for name, p in unet.named_parameters()
    }


def measure(settings: dict[str, Any], device: torch.device, rounds: int) -> dict[str, Any]:
    """Of a step that is not the first."""
    config = config_of(allow_cpu_bf16=True, **settings)
    dtype = torch.bfloat16 if config.pure_bf16 else torch.float32
    parameters = small_parameters(dtype, device)
    optimizer = Optimizer(parameters, config, device)
    finite = torch.tensor(True, device=device)
    seconds, dispatched = [], Dispatched()
    for number in range(rounds + 2):
        for parameter in parameters.values():
            parameter.grad = torch.ones_like(parameter)
        if number == rounds + 1:
            with dispatched:
                optimizer.step(number, 1e-4, finite)
            break
        since = time.thread_time()
        optimizer.step(number, 1e-4, finite)
        seconds.append(time.thread_time() - since)
    return {
        "tensors": len(parameters),
        "host s": statistics.median(seconds[1:]),
        **{name: dispatched.counts[name] for name in ("operations", "reads")},
    }


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--out", default=Path("benchmark-output"), type=click.Path(path_type=Path))
def main(rounds: int, device: str, out: Path) -> None:
    """A table of host seconds a step."""
    torch.set_num_threads(1)
    rows = [{"run": name, **measure(s, torch.device(device), rounds)} for name, s in RUNS]
    show("an optimizer step over tensors of a few elements, as many as SDXL has", rows)
    keep(out / "optimizer_step.json", {"machine": machine(device), "rows": rows})


if __name__ == "__main__":
    main()
