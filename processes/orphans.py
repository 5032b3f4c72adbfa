"""Processes of ``--gpus`` or torchrun end with the launcher that started them. Imports no torch.

A launcher that is killed outright (by the system for want of memory, by a scheduler) cannot end its
processes: they would train on, hold the GPUs and write into the run's folder. So each watches for
itself.
"""

import os
import signal
import sys
import threading
import time
from contextlib import suppress

LAUNCHER = "SHARDTUNE_LAUNCHER"  # environment variable with our own launcher's process id
SHUTDOWN_SECONDS = 120  # for the last checkpoint, before a process that was told to stop is killed
POLL_SECONDS = 0.5


def end_with_launcher() -> None:
    """From here on, stop this process when the one that started it is gone: as SIGTERM does, with a
    checkpoint, and if that takes too long, at once. No-op unless a launcher of torch started it.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = int(os.environ.get(LAUNCHER, os.getppid()))
        threading.Thread(target=_watch, args=(launcher,), daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:  # an orphan gets another parent, whatever the system
        time.sleep(POLL_SECONDS)
    if os.environ.get("RANK") == "0":
        with suppress(OSError, ValueError):  # where it was shown may be gone too
            print("Error: the launcher was killed, so its processes stop", file=sys.stderr)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SHUTDOWN_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
