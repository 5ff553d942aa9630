"""Starting the processes that share one training, with torchrun's own means."""

import logging
import os
import signal
import sys
import uuid

from sae_core.utils.errors import Interrupted
from sae_core.utils.gpu_lease import lease_gpus
from sae_core.utils.ranks import local_rank

SHUTDOWN_SECONDS = 300
"""Seconds that the processes may take to store their state after a signal."""


def launched(n: int) -> bool:
    """If several processes should do the work and this is not one of them, run this program, with
    its command line, as `n` processes that know of each other, and wait for them.

    Returns:
        Whether they did it.

    Raises:
        Interrupted: a signal came, and they have stored their state.
        SystemExit: one of them failed, and has said why; the others were ended.
    """
    if n == 1 or local_rank() is not None:
        return False
    _launch(n)
    return True


def _launch(n: int) -> None:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from sae_core.distributed.interrupts import SIGNALS

    lease_gpus()  # for all of them
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    n_threads = int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0))))
    os.environ["OMP_NUM_THREADS"] = str(max(1, n_threads // n))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=n,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        signals_to_handle=",".join(number.name for number in SIGNALS),
        shutdown_timeout=SHUTDOWN_SECONDS,
    )
    try:
        elastic_launch(config, sys.executable)(*sys.argv)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        sys.exit(os.EX_TEMPFAIL if os.EX_TEMPFAIL in codes else 1)
    except SignalException as error:
        name = signal.Signals(error.sigval).name
        raise Interrupted(f"interrupted by {name}; run it again to continue") from None
