"""Forward and backward passes as CUDA graphs (``--cuda-graphs``): the host starts one thing for a
micro-batch, and not thousands of kernels.

A graph is a recording of kernels with the addresses that they read and write, so

- there is one for each size of batches (``MAX_GRAPHS`` at most; other sizes are computed as without
  graphs), recorded when a size has been computed ``WARM_UPS`` times;
- a batch is copied into tensors that the graph reads. All that is drawn at random is in the batch;
- gradients are added to tensors that stay: they are set to zero between steps, never dropped;
- what it returns is copied out before the next replay, which may write over it: all graphs share
  one pool of memory, and take turns in it.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch

from shards.batches import Batch
from train.config import TrainConfig

MAX_GRAPHS = 16
WARM_UPS = 3  # by then kernels are loaded and libraries have their workspaces; torch's own number

Results = tuple[torch.Tensor, ...]


def why_no_graphs(config: TrainConfig, device: str, num_processes: int) -> str | None:
    """Why a run with ``--cuda-graphs`` on this type of device takes none; None where it does."""
    reasons = {
        "graphs are CUDA's, and the run is not on CUDA": device != "cuda",
        "several processes exchange gradients during the backward pass": num_processes > 1,
        "--compile and graphs have not been tried together": config.compile,
        "--pure-bf16 drops the gradients of each step": config.pure_bf16,
        "--fused-backward updates the weights during the backward pass": config.fused_backward,
        "nf4 weights are computed with by another library": config.base_quant == "nf4",
    }
    return next((reason for reason, is_so in reasons.items() if is_so), None)


@dataclass(frozen=True)
class _Recorded:
    """A graph with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    results: Results


class CudaGraphs:
    """Calls ``compute`` on micro-batches on the GPU, or replays what a call has recorded.

    ``compute`` adds to the gradients of ``parameters``, which nobody may drop or replace from the
    first recording on.
    """

    def __init__(
        self,
        compute: Callable[[Batch], Results],
        parameters: Iterable[torch.nn.Parameter],
    ) -> None:
        self.compute, self._parameters = compute, list(parameters)
        self.counts: Counter[str] = Counter()  # micro-batches: "replayed", "warm-up", "no graph"
        self._graphs: dict[tuple[Any, ...], _Recorded] = {}
        self._met: Counter[tuple[Any, ...]] = Counter()  # sizes of batches
        self._gradients: list[torch.Tensor | None] = []
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, batch: Batch) -> Results:
        """What ``compute`` returns for a batch on the GPU, in tensors of the caller's own."""
        size = _size_of(batch)
        self._met[size] += 1
        if size not in self._graphs:
            if self._met[size] <= WARM_UPS:
                self.counts["warm-up"] += 1
                return self._warm_up(batch)
            if len(self._graphs) == MAX_GRAPHS:
                self.counts["no graph"] += 1
                return self.compute(batch)
            self._graphs[size] = self._record(batch)
        self.counts["replayed"] += 1
        return self._replay(self._graphs[size], batch)

    def describe(self) -> str:
        """How many micro-batches were computed in which way."""
        counts, num = self.counts, len(self._graphs)
        text = (
            f"--cuda-graphs: {counts['replayed']:,} of {counts.total():,} micro-batches were "
            f"replayed, of {num} size{'s' * (num != 1)}; {counts['warm-up']:,} were warm-ups"
        )
        if counts["no graph"]:
            text += f"; {counts['no graph']:,} were of sizes beyond the first {MAX_GRAPHS}"
        return text

    def _warm_up(self, batch: Batch) -> Results:
        """Compute a batch of the run on another stream, as torch asks for before a recording."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            results = self.compute(batch)
        current.wait_stream(self._stream)
        return results

    def _record(self, batch: Batch) -> _Recorded:
        """Record ``compute``; nothing is computed meanwhile.

        Raises:
            RuntimeError: the device cannot record something that it does.
        """
        own = batch.map(torch.clone)
        self._gradients = [parameter.grad for parameter in self._parameters]
        graph = torch.cuda.CUDAGraph()
        try:
            # Threads that read ahead pin memory meanwhile, which the mode for all threads forbids.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                results = self.compute(own)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            error.add_note("It came while a CUDA graph was recorded; try without --cuda-graphs.")
            raise
        return _Recorded(graph, own, results)

    def _replay(self, recorded: _Recorded, batch: Batch) -> Results:
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            assert parameter.grad is gradient, "a gradient that graphs write to was replaced"
        torch._foreach_copy_(_tensors(recorded.batch), _tensors(batch))
        recorded.graph.replay()
        return tuple(result.clone() for result in recorded.results)


def _tensors(batch: Batch) -> list[torch.Tensor]:
    values = (getattr(batch, field.name) for field in fields(batch))
    return [value for value in values if isinstance(value, torch.Tensor)]


def _size_of(batch: Batch) -> tuple[Any, ...]:
    """All of a batch that is fixed in a graph."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    tensors = ((k, v.shape, v.dtype) for k, v in values.items() if isinstance(v, torch.Tensor))
    return batch.num_entries, *tensors
