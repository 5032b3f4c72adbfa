"""What is random about a sample in a pass: drawn from a stream of its own.

Keyed, not drawn in turn: the same on every device, at any world size and batch size, after any
resume, and whatever else a run reads.
"""

import numpy as np
import numpy.typing as npt

from shards.plan import derive_key

NUM_UNIFORMS = 8  # some spare: another choice shall leave the noise of all runs as it is


class Draws:
    """The draws of one sample after the other; for one thread.

    A stream is Philox keyed by (seed, epoch, cache, sample, pass). One generator serves them all,
    as making one takes ten times as long as keying it anew.

    ``variant``, ``caption``, ``dropout`` and ``time`` are uniform in [0, 1), and exact in fp32.
    """

    def __init__(self) -> None:
        self._bits = np.random.Philox(key=0)
        self._fresh = self._bits.state
        self._stream = np.random.Generator(self._bits)

    def start(self, seed: int, epoch: int, cache: int, key: str, pass_: int) -> None:
        """Go to the beginning of a sample's stream."""
        high, low = divmod(derive_key("sample", seed, epoch, cache, key, pass_), 2**64)
        self._fresh["state"]["key"][:] = low, high
        self._bits.state = self._fresh
        uniforms = self._stream.random(NUM_UNIFORMS, np.float32).tolist()
        self.variant, self.caption, self.dropout, self.time = uniforms[:4]

    def normal(self, out: npt.NDArray[np.float32]) -> None:
        """Fill ``out`` with the stream's next standard normals."""
        self._stream.standard_normal(out=out, dtype=np.float32)


def pick(uniform: float, size: int) -> int:
    """Of 0..size-1, each as likely as the others."""
    return int(uniform * size)
