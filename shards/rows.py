"""Where the slices of a batch's samples go, each copied once."""

import functools
from collections.abc import Iterable, Sequence

import torch

from shards.sample import DTYPES, Layout


class Rows:
    """One tensor per name, with a row per sample; uninitialised at first.

    Samples of several dtypes are kept whole: fp16 and bf16 together are neither, but fp32.
    """

    def __init__(self, names: Sequence[str], layouts: Sequence[Layout]) -> None:
        self._dtypes = [DTYPES[layout.dtype] for layout in layouts]
        self._dtype = functools.reduce(torch.promote_types, set(self._dtypes))
        self.tensors = {}
        for name in names:
            dtype = torch.int32 if name == "sizes" else self._dtype
            self.tensors[name] = torch.empty(len(layouts), *layouts[0].shape(name), dtype=dtype)
        self._bytes = {
            name: tensor.view(torch.uint8).view(-1).numpy().data
            for name, tensor in self.tensors.items()
        }

    def fill(self, number: int, slices: Iterable[tuple[str, memoryview]]) -> list[str]:
        """Row ``number`` of these tensors from the bytes of their slices; returns their names."""
        theirs, names = self._dtypes[number], []
        same, into = theirs == self._dtype, self._bytes
        for name, source in slices:
            names.append(name)
            if same or name == "sizes":
                size = len(source)
                into[name][number * size : (number + 1) * size] = source
            else:
                row = self.tensors[name][number].view(-1)
                row.copy_(torch.frombuffer(bytearray(source), dtype=theirs))
        return names
