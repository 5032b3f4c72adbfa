"""Stands in for torch's CUDA graphs, on the CPU or where CUDA is pretended.

What an operation is, which tensors it reads and which it writes is recorded while a graph is
captured; a replay does the same operations on the same tensors, and nothing else: no Python of ours
runs, so that a number, a tensor or an address that has changed since is not seen. As on a card

- nothing is computed by a capture: what it writes is put back, and what it makes is NaN;
- values cannot be read, nor copied between devices, during a capture;
- graphs that share a pool write over each other's results: before a replay those of all others
  become NaN. (A card may be kinder.)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

FORBIDDEN = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.is_nonzero.default,
)
events: list[str] = []  # waits of streams, in order


def tensors_of(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def storage_of(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any, Any]] = []  # function, args, kwargs, new results
        self._made: set[int] = set()  # storages
        self._before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {}))
        written = self._written(function, args, kwargs)
        for tensor in written:
            if storage_of(tensor) not in self._made:
                self._before.append((tensor, tensor.clone()))
        result = function(*args, **kwargs)
        given = tensors_of((args, kwargs))
        devices = {t.device.type for t in (*given, *tensors_of(result)) if t.dim() or t.is_cuda}
        if function in FORBIDDEN or len(devices) > 1:
            raise RuntimeError(f"{function}: not permitted when a stream is capturing")
        new = tree_map_only(
            torch.Tensor,
            lambda t: None if storage_of(t) in map(storage_of, given) else t.detach(),
            result,
        )
        if tensors_of(new) or written:
            self.calls.append((function, args, kwargs, new))
            self._made |= set(map(storage_of, tensors_of(new)))
        return result

    @staticmethod
    def _written(function: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
        arguments = function._schema.arguments
        values = [*zip(arguments, args, strict=False)]
        values += [(a, kwargs[a.name]) for a in arguments if a.name in kwargs]
        return tensors_of([v for a, v in values if a.alias_info and a.alias_info.is_write])

    @torch.no_grad()
    def end(self) -> None:
        for tensor, before in reversed(self._before):
            tensor.copy_(before)
        self.spoil()

    @torch.no_grad()
    def spoil(self) -> None:
        for *_, new in self.calls:
            for tensor in tensors_of(new):
                if tensor.is_floating_point():
                    tensor.fill_(float("nan"))

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, new in self.calls:
            again = function(*args, **kwargs)
            pairs = zip(tree_leaves(new), tree_leaves(again), strict=True)
            for into, value in pairs:
                if isinstance(into, torch.Tensor):
                    into.copy_(value)


class Graph:
    """``torch.cuda.CUDAGraph``."""

    def __init__(self) -> None:
        self.recorder, self.pool = Recorder(), []  # type: ignore[var-annotated]

    def replay(self) -> None:
        for other in self.pool:
            if other is not self:
                other.recorder.spoil()
        self.recorder.replay()


@contextmanager
def graph(graph: Graph, *, pool: list[Graph], capture_error_mode: str) -> Iterator[None]:
    """``torch.cuda.graph``."""
    assert capture_error_mode == "thread_local", "threads read ahead"
    events.append("capture")
    with graph.recorder:
        yield
    graph.recorder.end()
    pool.append(graph)
    graph.pool = pool


class Stream:
    """``torch.cuda.Stream``: notes who waits for whom."""

    current: "Stream"

    def __init__(self, name: str = "side") -> None:
        self.name = name

    def wait_stream(self, other: "Stream") -> None:
        events.append(f"{self.name} waits for {other.name}")


Stream.current = Stream("main")


@contextmanager
def stream(stream: Stream) -> Iterator[None]:
    """``torch.cuda.stream``."""
    before, Stream.current = Stream.current, stream
    try:
        yield
    finally:
        Stream.current = before


def stand_in(put: Callable[[Any, str, Any], None]) -> None:
    """``put`` is ``setattr``, or what undoes it at the end of a test."""
    events.clear()
    instead: dict[str, Any] = {
        "CUDAGraph": Graph,
        "Stream": Stream,
        "current_stream": lambda: Stream.current,
        "graph": graph,
        "graph_pool_handle": list,
        "stream": stream,
    }
    for name, value in instead.items():
        assert hasattr(torch.cuda, name), name
        put(torch.cuda, name, value)
