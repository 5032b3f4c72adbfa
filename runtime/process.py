"""Memory and threads of this process: how it keeps freed memory and waits; its free memory."""

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path

# Parameters of mallopt(3). glibc maps a block above the mapping threshold by itself, and unmaps it
# when it is freed; it gives back the free end of the heap above the trim threshold.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
THRESHOLD_BYTES = 1 << 30
_MAX_BEFORE_2_35 = 32 << 20  # the largest mapping threshold that older versions take
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second: before torch 2.9


def keep_freed_memory() -> bool:
    """Have this process use freed memory again before it asks the kernel for more.

    Returns whether it will.

    A model on a CPU frees large tensors at every layer and makes as many anew: the kernel would map
    and zero all their pages each time. Nothing is changed where the environment says how malloc is
    to behave, where another malloc is preloaded, or where the C library is not glibc.
    """
    tuned = any(name.startswith("MALLOC_") for name in os.environ)
    if tuned or "GLIBC_TUNABLES" in os.environ or "LD_PRELOAD" in os.environ:
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    sizes = (THRESHOLD_BYTES, _MAX_BEFORE_2_35)
    is_set = any(libc.mallopt(_MMAP_THRESHOLD, size) for size in sizes)
    return is_set and bool(libc.mallopt(_TRIM_THRESHOLD, THRESHOLD_BYTES))


def let_threads_sleep() -> None:
    """Have torch's threads sleep while they wait for each other. By default those of libgomp, which
    torch brings on Linux, spin, and beside other work that takes most of the processor's time. What
    the environment sets stays. To be called before torch is imported; no result depends on it."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def let_segments_grow() -> None:
    """Have torch's CUDA allocator extend its segments in place, unless the user has set it up.

    Batches come in many sizes, by bucket; otherwise memory that was reserved for one size and fits
    no other is lost. To be called before CUDA starts; child processes inherit it. Linux only.
    """
    if sys.platform == "linux" and not any(name in os.environ for name in ALLOCATOR):
        os.environ.update(dict.fromkeys(ALLOCATOR, "expandable_segments:True"))


CGROUPS = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Bytes of main memory that this process may still take: what the machine has available, or
    less where a container or a scheduler allows less."""
    import psutil

    free = int(psutil.virtual_memory().available)
    for folder, limit_name, usage_name in _cgroups():
        with suppress(OSError, ValueError):  # there is no such limit ("max")
            limit = int((folder / limit_name).read_text())
            taken = int((folder / usage_name).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cached = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
            free = min(free, max(0, limit - taken + cached))  # the file cache gives way
    return free


def _cgroups() -> list[tuple[Path, str, str]]:
    """The folders that may limit this process, with the names of limit and use: of both versions
    of cgroups, its own and those above it."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return []
    places: list[tuple[Path, str, str]] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = CGROUPS, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, names = CGROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        innermost = root / path.lstrip("/")
        above = [folder for folder in innermost.parents if folder.is_relative_to(root)]
        places += [(folder, *names) for folder in (innermost, *above)]
    return places
