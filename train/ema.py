"""An exponential moving average of the trained weights, in fp32."""

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

from runtime.devices import start_copy_to_host
from train.distributed import is_dtensor

BLOCK = 64  # parameters at once: few launches, and few copies where they are not fp32
WARMUP = 10  # early on, the average follows quickly: decay is at most (1 + n) / (WARMUP + n)


class Ema:
    """``values`` by name, of the shapes of ``parameters`` (of this rank's part of them).

    Step n (0, 1, ...) is value += (1 - d) (weight - value) with d = min(decay, (1 + n) / (10 + n)).
    With ``every`` above 1, that many steps are taken together: with the last weights, and the
    product of their d.

    With ``on_cpu`` the average of weights on a GPU is in the CPU's memory. The weights are copied
    to pinned memory while the next step runs, and a thread blends them in: the steps wait for
    neither, unless the previous update is not finished.
    """

    def __init__(
        self,
        parameters: dict[str, torch.nn.Parameter],
        decay: float,
        on_cpu: bool,
        every: int = 1,
    ) -> None:
        self.parameters, self.decay, self.on_cpu, self.every = parameters, decay, on_cpu, every
        self._values = {name: self._copy(p) for name, p in parameters.items()}
        self._stages: dict[str, torch.Tensor] = {}  # pinned, of weights on their way
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="average")
        self._blending: Future[None] | None = None

    def _copy(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        value = to_local(parameter.detach())
        return value.to("cpu" if self.on_cpu else value.device, torch.float32, copy=True)

    @property
    def values(self) -> dict[str, torch.Tensor]:
        """The average by name, as of the last ``update``."""
        if self._blending is not None:
            self._blending.result()
            self._blending = None
        return self._values

    def update(self, step: int) -> None:
        """Take optimizer step ``step`` (0, 1, ...), if it ends a group of ``every``."""
        if (step + 1) % self.every == 0:
            self._blend(step + 1 - self.every, step + 1)

    def finish(self, num_steps: int) -> None:
        """After the last of ``num_steps``, take the steps that ``update`` has not taken yet."""
        if left := num_steps % self.every:
            self._blend(num_steps - left, num_steps)

    @torch.no_grad()
    def _blend(self, first: int, end: int) -> None:
        """Take the steps from ``first`` to before ``end`` together."""
        decay = math.prod(min(self.decay, (1 + n) / (WARMUP + n)) for n in range(first, end))
        weights = {name: to_local(p.detach()) for name, p in self.parameters.items()}
        values = self.values
        if not (self.on_cpu and next(iter(weights.values())).is_cuda):
            self._lerp(values, weights, 1 - decay)
            return
        if not self._stages:
            self._stages = {
                name: torch.empty_like(weight, device="cpu", pin_memory=True)
                for name, weight in weights.items()
            }
        arrived = start_copy_to_host(weights, self._stages)

        def work() -> None:
            arrived.synchronize()
            self._lerp(values, self._stages, 1 - decay)

        self._blending = self._pool.submit(work)

    @staticmethod
    @torch.no_grad()
    def _lerp(
        values: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], share: float
    ) -> None:
        names = list(values)
        for start in range(0, len(names), BLOCK):
            block = names[start : start + BLOCK]
            current = [weights[name].to(values[name].device, torch.float32) for name in block]
            torch._foreach_lerp_([values[name] for name in block], current, share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While entered, the parameters are the average."""
        values = self.values
        with torch.no_grad():
            saved = {}
            for name, parameter in self.parameters.items():
                local = to_local(parameter.detach())
                saved[name] = local.to(values[name].device, copy=True)
                local.copy_(values[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    to_local(parameter.detach()).copy_(saved[name])

    def sizes(self) -> dict[str, int]:
        """The bytes of each whole tensor."""
        return {name: 4 * parameter.numel() for name, parameter in self.parameters.items()}

    def tensor(self, name: str) -> torch.Tensor:
        """The average of one parameter, on its device and sharded as it is; the average itself is
        not moved."""
        parameter, value = self.parameters[name], self.values[name]
        if not is_dtensor(parameter):
            return value
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            value.to(parameter.device),
            parameter.device_mesh,
            parameter.placements,
            shape=parameter.shape,
            stride=parameter.stride(),
        )


def to_local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that is sharded over ranks; any other as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor
