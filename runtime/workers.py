"""Which process of a command this is, and how several are started (``--gpus``).

Imports no torch until processes are counted or started: the command line looks here first.
"""

import logging
import os
import re
import signal
import sys
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import fields
from typing import Any, NamedTuple

LAUNCHER = "SHARDTUNE_LAUNCHER"  # environment variable with our own launcher's process id
SHUTDOWN_SECONDS = 120  # for the last checkpoint, before a process that was asked to stop is killed
ORPHAN_SECONDS = 0.5  # between looks at the launcher
MIN_ON_CPU = 4  # processes that any machine may try


# Which process this is.


class RankInfo(NamedTuple):
    """This process among ``size``; on this machine it is ``local_rank`` among ``local_size``."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    local_size: int = 1


def rank_info() -> RankInfo:
    """This process by torchrun's environment variables.

    Raises:
        ValueError: WORLD_SIZE is set and RANK is not.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return RankInfo()
    if "RANK" not in os.environ:
        raise ValueError("WORLD_SIZE is set and RANK is not: start several processes by torchrun")
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    return RankInfo(int(os.environ["RANK"]), local_rank, size, local_size)


def is_main_process() -> bool:
    """Whether this process is the one that prints."""
    return os.environ.get("RANK", "0") == "0"


def process_label() -> str:
    """The prefix of a message from a process that is not the main one: ``process 1: ``."""
    return "" if is_main_process() else f"process {os.environ['RANK']}: "


# Starting several: --gpus.


def check_gpus(gpus: str | None) -> None:
    """Refuse what is neither a number from 1 on nor ``auto``; None is one process.

    Raises:
        ValueError: names the value.
    """
    is_count = gpus is not None and re.fullmatch("[0-9]{1,6}", gpus) and int(gpus) > 0
    if gpus not in (None, "auto") and not is_count:
        raise ValueError(f"--gpus takes a number from 1 on, or auto, not {gpus}")


def num_processes(gpus: str | None, device: str) -> int:
    """How many processes this one should start; 1 means that it does the work itself.

    Raises:
        ValueError: more than there are GPUs; or SLURM has started several tasks, by itself.
    """
    _refuse_slurm_tasks(gpus)
    if gpus is None or "RANK" in os.environ:
        return 1
    import torch

    num_gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    if gpus == "auto":
        return max(1, num_gpus)
    num = int(gpus)
    if num_gpus and num > num_gpus:
        raise ValueError(f"--gpus {num}: this machine has {num_gpus}")
    if not num_gpus and num > (num_cores := os.cpu_count() or 1) and num > MIN_ON_CPU:
        raise ValueError(f"--gpus {num}: this machine has no GPU, and {num_cores} CPU cores")
    return num


def _refuse_slurm_tasks(gpus: str | None) -> None:
    """Refuse to be one of several tasks of SLURM that know nothing of each other: each would do all
    of the work. A script of SLURM's, which runs once, may start processes by ``--gpus``."""
    tasks, in_step = os.environ.get("SLURM_NTASKS", "1"), "SLURM_STEP_NUM_TASKS" in os.environ
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", tasks)
    if "WORLD_SIZE" in os.environ or tasks == "1" or (gpus is not None and not in_step):
        return
    raise ValueError(
        f"SLURM has {tasks} tasks, and each would do all of the work. Start one task per machine, "
        "with torchrun: srun --ntasks-per-node=1 torchrun --nnodes=$SLURM_NNODES "
        "--nproc-per-node=gpu --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 cli.py ...; or, on "
        "one machine, --gpus auto in a job of one task (sbatch --ntasks=1)"
    )


def launch(num: int) -> None:
    """Run this command in ``num`` processes by torch's own launcher, and wait for its end.

    Raises:
        SystemExit: with the exit code of the process that failed first, whose message stands
            above; 130 or 143 after Ctrl-C or SIGTERM.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Older versions of torch have no shutdown_timeout: there it is 30 seconds.
    options: dict[str, Any] = {"shutdown_timeout": SHUTDOWN_SECONDS}
    parameters = {field.name for field in fields(LaunchConfig)}
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(),
        **{name: value for name, value in options.items() if name in parameters},
    )
    os.environ[LAUNCHER] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num)))
    for part in ("", ".agent.server.api"):  # we report it below
        logging.getLogger("torch.distributed.elastic" + part).setLevel(logging.CRITICAL)
    try:
        elastic_launch(config, sys.executable)(*sys.argv)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        if code < 0:
            name = signal.Signals(-code).name
            remark = " (most likely out of memory)" if name == "SIGKILL" else ""
            print(f"Error: process {rank} was killed by {name}{remark}", file=sys.stderr)
        elif code not in (130, 143):
            reason = f"process {rank} failed with exit code {code}; its message stands above"
            print(f"Error: {reason}", file=sys.stderr)
        raise SystemExit(code if code > 0 else 1) from None
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None


def end_with_launcher() -> None:
    """From here on, stop this process when the one that started it is gone: as SIGTERM does, with a
    checkpoint, and if that takes too long, at once. No-op unless a launcher of torch started it.

    A launcher that is killed outright (by the system when memory runs out, by a scheduler) cannot
    end its processes: they would train on, hold the GPUs and write into the run's folder.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = int(os.environ.get(LAUNCHER, os.getppid()))
        threading.Thread(target=_watch, args=(launcher,), daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:  # an orphan gets another parent, whatever the system
        time.sleep(ORPHAN_SECONDS)
    if is_main_process():
        with suppress(OSError, ValueError):  # stderr may be gone too
            print("Error: the launcher was killed, so its processes stop", file=sys.stderr)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SHUTDOWN_SECONDS)
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))  # Windows has but one
