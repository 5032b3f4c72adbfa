"""How this process waits and keeps memory, set before torch is imported; how much it may take."""

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path

# Of mallopt(3). glibc maps what is larger than the one by itself, and unmaps it when it is freed;
# it gives back the end of the heap when that is free and larger than the other.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 1 << 30
_MOST_BEFORE_2_35 = 32 << 20  # that older versions take as the mapping threshold
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second: before torch 2.9


def keep_freed_memory() -> bool:
    """Let this process use freed memory again before it asks the kernel for more; whether it will.

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
    kept = any(libc.mallopt(_MMAP_THRESHOLD, size) for size in (KEPT_BYTES, _MOST_BEFORE_2_35))
    return kept and bool(libc.mallopt(_TRIM_THRESHOLD, KEPT_BYTES))


def let_threads_sleep() -> None:
    """Threads of torch that wait for each other shall sleep: by default those of libgomp, which
    torch brings on Linux, spin, and beside other work that takes most of the processor's time. The
    environment has the say. Before torch is imported; no result depends on it."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def let_segments_grow() -> None:
    """Have torch's CUDA allocator extend its segments in place, unless the user has set it up.

    Batches come in many sizes, by bucket; what was reserved for one and fits no other is lost
    otherwise. Before CUDA starts; processes that this one starts inherit it. Linux alone has it.
    """
    if sys.platform == "linux" and not any(name in os.environ for name in ALLOCATOR):
        os.environ.update(dict.fromkeys(ALLOCATOR, "expandable_segments:True"))


CGROUPS = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Bytes of main memory that this process may still take: what the machine has available, or
    less where a container or a scheduler allows less."""
    import psutil

    free = int(psutil.virtual_memory().available)
    for folder, most, used in _cgroups():
        with suppress(OSError, ValueError):  # there is no such limit ("max")
            limit = int((folder / most).read_text())
            taken = int((folder / used).read_text())
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
        own = root / path.lstrip("/")
        above = [folder for folder in own.parents if folder.is_relative_to(root)]
        places += [(folder, *names) for folder in (own, *above)]
    return places
