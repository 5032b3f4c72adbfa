"""An exponential moving average of the trained weights, in fp32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from train.distributed import is_dtensor

BLOCK = 64  # parameters at once: few launches, and few copies where they are not fp32
WARMUP = 10  # early on, the average follows quickly: decay is at most (1 + n) / (WARMUP + n)


class Ema:
    """``values`` by name, of the shapes of ``parameters`` (of this rank's part of them)."""

    def __init__(
        self, parameters: dict[str, torch.nn.Parameter], decay: float, on_cpu: bool
    ) -> None:
        self.parameters, self.decay, self.on_cpu = parameters, decay, on_cpu
        self.values = {name: self._copy(p) for name, p in parameters.items()}

    def _copy(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        value = to_local(parameter.detach())
        return value.to("cpu" if self.on_cpu else value.device, torch.float32, copy=True)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step ``step`` (0, 1, ...): value += (1 - decay) (weight - value)."""
        decay = min(self.decay, (1 + step) / (WARMUP + step))
        names = list(self.parameters)
        for start in range(0, len(names), BLOCK):
            values = [self.values[name] for name in names[start : start + BLOCK]]
            parameters = [self.parameters[name].detach() for name in names[start : start + BLOCK]]
            place = values[0].device
            current = [to_local(parameter).to(place, torch.float32) for parameter in parameters]
            torch._foreach_lerp_(values, current, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While entered, the parameters are the average."""
        with torch.no_grad():
            kept = {}
            for name, parameter in self.parameters.items():
                value, here = self.values[name], to_local(parameter.detach())
                kept[name] = here.to(value.device, copy=True)
                here.copy_(value)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    to_local(parameter.detach()).copy_(kept[name])

    def sizes(self) -> dict[str, int]:
        """The bytes of each whole tensor."""
        return {name: 4 * parameter.numel() for name, parameter in self.parameters.items()}

    def tensor(self, name: str) -> torch.Tensor:
        """The average of one parameter, laid out over the ranks as that is, on its device; the
        average itself stays where it is kept."""
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
