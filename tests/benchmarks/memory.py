"""The most memory that the first training steps take above weights, optimizer state and the batch,
and the processor time of the last of them."""

import argparse
import threading
import time
from pathlib import Path
from typing import get_args

from machine import describe
from step import Shape, batches, ours

from sae_core.sae.config import SAEType
from sae_core.utils.devices import keep_freed_memory


def resident() -> int:
    """Bytes of this process in memory."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmRSS:")[1].split()[0])


class Peak(threading.Thread):
    """The most that `resident` was, looked at all the time."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.running = 0, True

    def run(self) -> None:
        while self.running:
            self.most = max(self.most, resident())
            time.sleep(0.001)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--d", type=int, default=576)
    parser.add_argument("--width", type=int, default=36_864)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--kind", choices=get_args(SAEType), default="batch_topk")
    options = parser.parse_args()
    shape = Shape(options.d, options.width, options.k, options.tokens)
    keep_freed_memory()
    x = batches(shape)[0]
    step = ours(shape, "auto", dead=False, kind=options.kind)
    weights = 4 * (2 * shape.d * shape.width + shape.width + shape.d)
    before = resident()  # weights and batch
    peak = Peak()
    peak.start()
    for _ in range(4):
        start = time.process_time()
        step(x)
        seconds = time.process_time() - start
    peak.running = False
    peak.join()
    taken = peak.most - before - 2 * weights  # what is left besides Adam's two moments
    print(f"\nPeak memory of a step ({describe()})\n")
    print("| kind | d, F, k, N | above weights and optimizer | processor time |\n|---|---|--:|--:|")
    sizes = ", ".join(f"{size:,}" for size in shape)
    print(f"| `{options.kind}` | {sizes} | {taken / 1e6:,.0f} MB | {seconds:.2f} s |")


if __name__ == "__main__":
    main()
