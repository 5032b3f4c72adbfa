"""Where the slices of a batch's samples go, each copied once."""

import functools
from collections.abc import Iterable, Sequence

import torch

from runtime.devices import DTYPES
from shards.index import Stretch
from shards.sample import Layout


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

    def fill(self, number: int, stretches: Iterable[tuple[Stretch, memoryview]]) -> None:
        """Row ``number`` from the bytes of a sample's stretches; slices of other tensors than these
        are left out."""
        theirs, into = self._dtypes[number], self._bytes
        same = theirs == self._dtype
        for stretch, source in stretches:
            for name, start, stop in stretch.slices:
                if name not in into:
                    continue
                if same or name == "sizes":
                    at, size = number * (stop - start), stop - start
                    into[name][at : at + size] = source[start:stop]
                else:
                    row = self.tensors[name][number].view(-1)
                    row.copy_(torch.frombuffer(bytearray(source[start:stop]), dtype=theirs))
