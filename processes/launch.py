"""``--gpus``: one process for each GPU of this machine, by torch's own launcher."""

import logging
import os
import signal
import sys
import uuid
from dataclasses import fields
from typing import Any

from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from processes.orphans import LAUNCHER, SHUTDOWN_SECONDS


def launch(num: int) -> None:
    """Run this very command in ``num`` processes, to its end.

    Raises:
        SystemExit: with the exit code of the process that failed first, whose message stands
            above; 130 or 143 after Ctrl-C or SIGTERM.
    """
    # Older versions of torch have no shutdown_timeout: there it is 30 seconds.
    options: dict[str, Any] = {"shutdown_timeout": SHUTDOWN_SECONDS}
    known = {field.name for field in fields(LaunchConfig)}
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(),
        **{name: value for name, value in options.items() if name in known},
    )
    os.environ[LAUNCHER] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num)))
    for part in ("", ".agent.server.api"):  # we say it below
        logging.getLogger("torch.distributed.elastic" + part).setLevel(logging.CRITICAL)
    try:
        elastic_launch(config, sys.executable)(*sys.argv)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        if code < 0:
            name = signal.Signals(-code).name
            reason = f"process {rank} was killed by {name}; if by the system, for want of memory"
            print(f"Error: {reason}", file=sys.stderr)
        elif code not in (130, 143):
            reason = f"process {rank} failed with exit code {code}; its message stands above"
            print(f"Error: {reason}", file=sys.stderr)
        raise SystemExit(code if code > 0 else 1) from None
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None
