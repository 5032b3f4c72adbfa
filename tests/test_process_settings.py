"""Freed memory is used again, threads sleep, and no setting of the user's is overridden."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.process import let_threads_sleep

ROOT = Path(__file__).parent.parent

# What a VAE does on a CPU: large tensors, one after the other.
FAULTS = """
import ctypes, json, resource, sys
from runtime.process import keep_freed_memory
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages, of which the machine has more or fewer
kept = sys.argv[1] == "keep" and keep_freed_memory()
import numpy as np
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    np.ones(48 << 20, dtype=np.uint8)
print(json.dumps([kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before]))
"""


def child(mode: str, **variables: str) -> tuple[bool, int]:
    """Whether malloc was told to keep memory, and the page faults of the work that followed."""
    expected = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(expected)}
    command = [sys.executable, "-c", FAULTS, mode]
    output = subprocess.check_output(command, cwd=ROOT, env={**kept, **variables}, text=True)
    done, faults = json.loads(output)
    return done, faults


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is of Linux")
def test_freed_memory_is_used_again() -> None:
    kept, few = child("keep")
    if not kept:
        pytest.skip("the C library is not glibc")
    assert few * 4 < child("leave")[1]


@pytest.mark.parametrize(
    "variable", [("MALLOC_ARENA_MAX", "2"), ("GLIBC_TUNABLES", ""), ("LD_PRELOAD", "")]
)
def test_the_environment_has_the_say(variable: tuple[str, str]) -> None:
    assert child("keep", **dict([variable]))[0] is False


def test_threads_sleep_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "100")
    let_threads_sleep()
    assert "OMP_WAIT_POLICY" not in os.environ
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    let_threads_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    let_threads_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
