"""Which of the processes that share a training this is. No torch here."""

import os


def local_rank() -> int | None:
    """The index of this process's GPU on this machine; None if it shares no training."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return int(os.environ["LOCAL_RANK"]) if several else None


def is_follower() -> bool:
    """Whether another process of the same training reports for this one."""
    return local_rank() is not None and int(os.environ["RANK"]) > 0
