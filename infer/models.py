"""The models of a run, on a device that may be too small for all of them at once."""

import gc
from collections.abc import Callable
from typing import Any

import torch

TEXT, UNET, VAE = "text encoders", "unet", "vae"
PLAIN_TEXT, PLAIN_UNET = "text encoders without", "unet without"  # of --compare
CPU = torch.device("cpu")


class Models:
    """Each is loaded when it is first asked for. On a small card one is there at a time, and the
    others wait in the CPU's memory.

    ``loaders`` give models on the CPU; ``working_bytes`` is what computing takes besides them.
    ``low_memory`` None: the card is small where they do not all fit in what is free.
    """

    def __init__(
        self,
        device: torch.device,
        loaders: dict[str, Callable[[], Any]],
        working_bytes: int,
        low_memory: bool | None,
    ) -> None:
        self.device, self.loaders, self.working_bytes = device, dict(loaders), working_bytes
        self._small = low_memory
        self._held: dict[str, Any] = {}
        self._there: set[str] = set()  # names of those on the device

    @property
    def small(self) -> bool:
        """Whether the models take turns. Found out when it is first asked, once they are loaded."""
        if self._small is None:
            self._small = self.device.type == "cuda" and not self._fit()
        return self._small

    def _fit(self) -> bool:
        missing = [name for name in self.loaders if name not in self._there]
        needed = sum(_num_bytes(self._hold(name)) for name in missing)
        free, _ = torch.cuda.mem_get_info(self.device)
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return needed + self.working_bytes <= free + unused

    def _hold(self, name: str) -> Any:
        if name not in self._held:
            self._held[name] = self.loaders[name]()
        return self._held[name]

    def at_work(self, name: str) -> Any:
        """A model on the device; alone there, where the models take turns."""
        model = self._hold(name)
        if name not in self._there:
            if self._there and self.small:
                for other in self._there:
                    self._held[other].to(CPU)
                self._there.clear()
                _release(self.device)
            model.to(self.device)
            self._there.add(name)
        return model

    def drop(self, name: str) -> None:
        """A model that is not needed any more."""
        self.loaders.pop(name, None)
        self._there.discard(name)
        if self._held.pop(name, None) is not None:
            gc.collect()
            _release(self.device)


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _num_bytes(model: Any) -> int:
    """Of the weights of a model, or of both text encoders."""
    parts = getattr(model, "models", (model,))
    return sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
