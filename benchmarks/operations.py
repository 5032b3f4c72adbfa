"""What a step at full size launches and moves, counted over fake tensors: nothing is computed. Of a
LoRA, with our forward passes and with peft's and diffusers' own; of a full fine-tune without
checkpointing, with our norms and with those of CUDA's autocast.

A launch is an operation that writes memory (views and empty tensors are none). Its bytes are those
of the tensors that it reads and writes. Operations that are no matrix product, convolution or
attention are elementwise here, norms among them.

    python -m benchmarks.operations [--full] [--pixels 1024] [--out benchmark-output]
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch
from torch.nn.functional import group_norm, layer_norm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.allocations import batch_of, fake_learner
from benchmarks.estimates import config_of
from benchmarks.report import keep, machine, show
from train.config import TrainConfig
from train.learner import train_step

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "attention")
NOT_LAUNCHED = ("empty", "detach", "alias", "_local_scalar_dense", "set_", "lift_fresh")
SETTINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("no checkpointing", {"gradient_checkpointing": False}),
    ("checkpointing", {"gradient_checkpointing": True}),
)


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Launches, bytes of elementwise operations, casts and divisions by one."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:  # the optimizer's own numbers
            return True if args[0].dtype == torch.bool else 1
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        given = _tensors((args, kwargs))
        made = _tensors(result)
        storages = {tensor.untyped_storage()._cdata for tensor in given}
        views = not function._schema.is_mutable and all(
            tensor.untyped_storage()._cdata in storages for tensor in made
        )
        if views or any(part in name for part in NOT_LAUNCHED):
            return result
        self.counts["launches"] += 1
        if not any(part in name for part in PRODUCTS):
            self.counts["elementwise bytes"] += sum(map(_bytes, (*given, *made)))
        if name in ("_to_copy", "copy_", "_foreach_copy_") and _is_cast(args, result):
            self.counts["casts"] += 1
        if name == "div" and args[1] == 1:
            self.counts["divisions by 1"] += 1
        return result


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _is_cast(args: Any, result: Any) -> bool:
    """Whether a copy changes the dtype; ``result`` is None where it is into a list of tensors."""
    return len({tensor.dtype for tensor in _tensors((args, result))}) > 1


def _bytes(tensor: torch.Tensor) -> int:
    """What is read or written: an expanded tensor is as large as what it is expanded from."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    numel = 1
    for size, stride in sizes:
        numel *= size if stride else 1
    return numel * tensor.element_size()


@contextmanager
def library_forwards() -> Iterator[None]:
    """While entered, UNets are built with the forward passes of peft and diffusers."""
    with mock.patch("train.unet.use_direct_forwards", lambda unet: None):
        yield


class CudaNorms(TorchFunctionMode):
    """Norms under autocast as CUDA has them: all in fp32. (On a CPU it leaves them alone.) Counts
    the dtypes of what they compute in."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: Counter[torch.dtype] = Counter()

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        is_norm = function in (group_norm, layer_norm)
        if is_norm and torch.is_autocast_enabled("cpu"):
            args = [a.float() if isinstance(a, torch.Tensor) else a for a in args]
        output = function(*args, **(kwargs or {}))
        if is_norm:
            self.outputs[output.dtype] += 1
        return output


@contextmanager
def autocasts_norms() -> Iterator[None]:
    """While entered, UNets are built and run with the norms of CUDA's autocast."""
    with mock.patch("train.unet.keep_norms_in_half", lambda unet: None), CudaNorms():
        yield


def step_of(config: TrainConfig, pixels: int, num: int) -> Counter[str]:
    """Counts of a step, when there is an optimizer state, and the bytes that its forward saves."""
    with fake_learner(config) as learner:
        batch = batch_of(pixels, num)
        train_step(learner, iter([batch]), 0, 1e-4)
        parameters = {p.untyped_storage()._cdata for p in learner.unet.parameters()}
        saved: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in parameters:
                saved[storage._cdata] = storage
            return tensor

        casts = nullcontext() if learner.casts is None else learner.casts.in_place()
        with Operations() as operations, casts:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = learner.losses(learner.unet, batch).mean()
            loss.backward()  # type: ignore[no-untyped-call]
    counts: Counter[str] = operations.counts
    counts["saved bytes"] = sum(storage.nbytes() for storage in saved.values())
    return counts


@click.command()
@click.option("--full", is_flag=True, help="A full fine-tune of fp32 weights.")
@click.option("--pixels", default=1024, show_default=True)
@click.option("--batch-size", default=4, show_default=True)
@click.option("--rank", default=16, show_default=True)
@click.option("--out", default=Path("benchmark-output"), type=click.Path(path_type=Path))
def main(full: bool, pixels: int, batch_size: int, rank: int, out: Path) -> None:
    """A table of a step's forward and backward pass, under bf16 autocast."""
    rows = []
    plain = autocasts_norms if full else library_forwards
    kind: dict[str, Any] = {"full": True} if full else {"rank": rank}
    for name, settings in SETTINGS[: 1 if full else None]:
        config = config_of(allow_cpu_bf16=True, **kind, **settings)
        with plain():
            library = step_of(config, pixels, batch_size)
        for whose, counts in (("theirs", library), ("ours", step_of(config, pixels, batch_size))):
            rows.append({"run": name, "norms" if full else "forwards": whose, **_row(counts)})
    trained = "the whole UNet" if full else f"LoRA {rank}"
    show(f"{trained}, {pixels} px, batch {batch_size}, bf16: a forward and backward pass", rows)
    keep(out / "operations.json", {"machine": machine(), "rows": rows})


def _row(counts: Counter[str]) -> dict[str, Any]:
    return {
        "launches": counts["launches"],
        "elementwise GB": counts["elementwise bytes"] / 1e9,
        "casts": counts["casts"],
        "divisions by 1": counts["divisions by 1"],
        "saved GB": counts["saved bytes"] / 1e9,
    }


if __name__ == "__main__":
    main()
