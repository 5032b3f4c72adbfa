"""Runs functions of the tests where torch has a CUDA device that is pretended: what is on it is in
the CPU's memory and computed there (``pretended_cuda.cpp``), so that the product's path through
CUDA runs, with numbers, on any machine.

It shows what is cast, which devices meet, what is pinned, how much is allocated, what is asked of
``torch.cuda``. It shows nothing of kernels: not their speed, not their rounding, no cuDNN.

torch cannot forget a device, so none is pretended in the process of the tests. A process that has
imported the product waits, and forks for each function.
"""

import ctypes
import hashlib
import importlib
import os
import pickle
import shutil
import subprocess
import sys
import traceback
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_suffix(".cpp")
ROOT = SOURCE.parents[1]


@dataclass
class Card:
    """What ``torch.cuda`` says of the device; a test may change it."""

    name: str = "pretended"
    major: int = 8  # compute capability
    minor: int = 0
    total_memory: int = 24 << 30  # bytes


CARD = Card()


# In the process of the tests.


def build(folder: Path) -> Path:
    """The library, compiled unless ``folder`` has it.

    Raises:
        FileNotFoundError: there is no compiler.
        subprocess.CalledProcessError: torch's headers have changed, it seems.
    """
    import torch

    digest = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()
    library = folder / f"pretended-cuda-{digest[:16]}.so"
    if library.exists():
        return library
    compiler = shutil.which("g++")
    if compiler is None:
        raise FileNotFoundError("no g++ to compile a pretended CUDA device with")
    folder.mkdir(parents=True, exist_ok=True)
    partial = library.with_suffix(f".{os.getpid()}.partial")
    home = Path(torch.__file__).parent
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", str(SOURCE), "-o", str(partial)]
    command += [f"-I{home}/include", f"-L{home}/lib", f"-Wl,-rpath,{home}/lib"]
    subprocess.run([*command, "-lc10", "-ltorch_cpu"], check=True, capture_output=True, text=True)
    os.replace(partial, library)
    return library


class PretendedCuda:
    """``cuda(function, *args)`` calls a function of a module of the tests where CUDA is pretended.
    Arguments and result are pickled."""

    def __init__(self, library: Path) -> None:
        self._calls, expected = Pipe()
        number = expected.fileno()
        command = [sys.executable, __file__, str(library), str(number)]
        self._process = subprocess.Popen(command, pass_fds=[number], cwd=ROOT)
        expected.close()

    def __call__(self, function: Any, *args: Any, **card: Any) -> Any:
        """``card`` are fields of ``Card``.

        Raises:
            AssertionError: the function failed; with its traceback.
        """
        self._calls.send(function.__module__)
        self._calls.send_bytes(pickle.dumps((function, args, card)))
        result, failure = self._calls.recv()
        assert not failure, f"on pretended CUDA:\n{failure}"
        return result

    def close(self) -> None:
        self._calls.close()
        self._process.wait()


# In the process that forks, and in its children.


def serve(library: Path, calls: Connection) -> None:
    """Answer calls, each in a child, until there are no more."""
    load(library)
    while True:
        try:
            importlib.import_module(calls.recv())  # once, and not in each child
            call = calls.recv_bytes()
        except EOFError:
            return
        child = os.fork()
        if not child:
            _answer(call, calls)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            calls.send((None, f"the process ended with exit code {code}"))


def _answer(call: bytes, calls: Connection) -> None:
    answered = False
    try:
        function, args, card = pickle.loads(call)
        pretend(**card)
        try:
            answer = function(*args), ""
        except BaseException:
            answer = None, traceback.format_exc()
        calls.send(answer)
        answered = True
    finally:
        os._exit(0 if answered else 1)


def load(library: Path) -> None:
    """Give torch the device, and import what needs seconds. Libraries must not see a card while
    they are imported: they would look for parts of torch that only a CUDA build has."""
    global _library
    _library = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    for name in ("live", "most"):
        getattr(_library, f"pretended_{name}_bytes").restype = ctypes.c_int64
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import runtime.errors

    runtime.errors.silence_libraries()
    import infer.generate  # noqa: F401
    import precompute.encode  # noqa: F401
    import train.loop  # noqa: F401


def pretend(**card: Any) -> None:
    """What a CUDA build of torch has in Python, and a CPU build has not."""
    import torch

    vars(CARD).update(card)
    torch.set_num_threads(1)
    live, most = _library.pretended_live_bytes, _library.pretended_most_bytes
    instead = {
        "_exchange_device": lambda device: 0,
        "_initialized": True,
        "_maybe_exchange_device": lambda device: 0,
        "default_generators": (torch.Generator("cuda"),),
        "device_count": lambda: 1,
        "empty_cache": lambda: None,
        "get_device_capability": lambda device=None: (CARD.major, CARD.minor),
        "get_device_name": lambda device=None: CARD.name,
        "get_device_properties": lambda device=None: CARD,
        "is_available": lambda: True,
        "max_memory_allocated": lambda device=None: most(),
        "max_memory_reserved": lambda device=None: most(),
        "mem_get_info": lambda device=None: (CARD.total_memory - live(), CARD.total_memory),
        "memory_allocated": lambda device=None: live(),
        "memory_reserved": lambda device=None: live(),
        "reset_peak_memory_stats": lambda device=None: _library.pretended_reset_most(),
        "set_device": lambda device: None,
        "set_per_process_memory_fraction": lambda share, device=None: _limit(share),
        "synchronize": lambda device=None: None,
    }
    for name, value in instead.items():
        assert hasattr(torch.cuda, name), name
        setattr(torch.cuda, name, value)
    torch._C._cuda_getDevice = lambda: 0  # type: ignore[attr-defined]
    _limit(1.0)


def _limit(share: float) -> None:
    _library.pretended_set_limit(ctypes.c_int64(int(share * CARD.total_memory)))


if __name__ == "__main__":
    import pretended_cuda  # the module that functions of the tests see

    pretended_cuda.serve(Path(sys.argv[1]), Connection(int(sys.argv[2])))
    os._exit(0)  # nothing is open, and to unload it all takes seconds
