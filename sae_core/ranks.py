"""Which of the processes that share a training this is. No torch here."""

import os


def local_rank() -> int | None:
    """Which of this machine's GPUs is this process's own; None if it shares no training."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return int(os.environ["LOCAL_RANK"]) if several else None


def is_follower() -> bool:
    """Whether another process speaks for this one, with which it shares a training."""
    return local_rank() is not None and int(os.environ["RANK"]) > 0
