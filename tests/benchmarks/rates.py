"""The rates of this machine, as an entry of `machines` in config/planning.yaml.

Each is measured alone, on random weights and data of sizes that no shipped configuration has: six
blocks of a Qwen3 model, training steps of SAEs of several shapes, a file that is written and read,
and the start of Python with all that a job imports.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
import yaml
from machine import describe
from step import SHAPES, Shape, batches, ours
from transformers import Qwen3Config, Qwen3Model

from sae_core.utils.devices import pick_device, pick_dtype
from sae_core.workflow.plan_tables import ModelShape
from sae_core.workflow.planning import OPTIMIZER_BYTES

MODEL = ModelShape(
    n_layers=6, d_model=1024, n_heads=16, n_kv_heads=8, head_dim=128, d_mlp=3072, vocab_size=1000,
    tied=True,
)  # fmt: skip
WINDOWS, LENGTH = 8, 256
FILE_BYTES = 2**28
REPEATS = 7

SMALLEST = Shape(64, 256, 4, 64)
LARGE = [
    Shape(1024, 65536, 64, 8192),
    Shape(2048, 16384, 256, 8192),
    Shape(2048, 65536, 32, 4096),
    Shape(4096, 32768, 128, 8192),
    Shape(4096, 65536, 64, 4096),
]
"""What keeps a GPU busy."""


def seconds(work: Callable[[], object]) -> float:
    """Median time of a call, after one that does not count."""
    taken = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


@torch.no_grad()
def model_tflops(device: torch.device) -> float:
    """Of the forward pass, in the number format that `auto` takes."""
    config = Qwen3Config(
        num_hidden_layers=MODEL.n_layers,
        hidden_size=MODEL.d_model,
        num_attention_heads=MODEL.n_heads,
        num_key_value_heads=MODEL.n_kv_heads,
        head_dim=MODEL.head_dim,
        intermediate_size=MODEL.d_mlp,
        vocab_size=MODEL.vocab_size,
    )
    model = Qwen3Model(config).to(device, pick_dtype("auto", device))
    tokens = torch.randint(MODEL.vocab_size, (WINDOWS, LENGTH), device=device)
    flops = WINDOWS * LENGTH * MODEL.flops(MODEL.n_layers, LENGTH)
    return flops / seconds(lambda: model(tokens, use_cache=False)) / 1e12


def step_rates(times: dict[Shape, float]) -> dict[str, float]:
    """The rates that explain the seconds of a training step in several shapes best: of the dense
    product, of the work on pairs, and of the memory traffic that no token adds to; beside the
    milliseconds of the smallest step."""
    floor = step_seconds(SMALLEST)
    weights = [2 * shape.d * shape.width for shape in times]
    rows = [
        [s.tokens * n / 1e12, s.tokens * 8 * s.k * s.d / 1e12, n * OPTIMIZER_BYTES / 1e9]
        for s, n in zip(times, weights, strict=True)
    ]
    relative = [
        [cost / taken for cost in row] for row, taken in zip(rows, times.values(), strict=True)
    ]
    rest = [[1 - floor / taken] for taken in times.values()]
    inverse = torch.linalg.lstsq(torch.tensor(relative), torch.tensor(rest)).solution
    names = ("sae_tflops", "pair_tflops", "bandwidth_gb_s")
    rates = dict(zip(names, (1 / inverse.flatten()).tolist(), strict=True))
    return rates | {"step_ms": 1e3 * floor}


def step_seconds(shape: Shape) -> float:
    """Of a training step, once its threshold has settled."""
    step, data = ours(shape, "auto", dead=False), batches(shape)
    for _ in range(4):
        for x in data:
            step(x)
    return seconds(lambda: [step(x) for x in data]) / len(data)


def disk(folder: Path) -> float:
    """GB/s of a file that is written and read."""
    data = bytes(FILE_BYTES)

    def write_and_read() -> None:
        (folder / "file").write_bytes(data)
        (folder / "file").read_bytes()

    return 2 * FILE_BYTES / seconds(write_and_read) / 1e9


def start() -> float:
    """Seconds."""
    command = [sys.executable, "-c", "import sae_core.sae_train, transformer_lens"]
    return seconds(lambda: subprocess.run(command, check=True))


def main() -> None:
    """Print the entry."""
    device = pick_device("auto")
    cuda = device.type == "cuda"
    total = torch.cuda.mem_get_info()[1] if cuda else psutil.virtual_memory().total
    with tempfile.TemporaryDirectory(dir=".") as folder:
        entry = {
            "model_tflops": model_tflops(device),
            **step_rates({shape: step_seconds(shape) for shape in (LARGE if cuda else SHAPES)}),
            "memory_gb": total / 1e9,
            "disk_gb_s": disk(Path(folder)),
            "start_seconds": start(),
        }
    rounded: dict[str, object] = {key: float(f"{value:.3g}") for key, value in entry.items()}
    rounded["basis"] = f"measured, {describe('transformers')}"
    print(yaml.safe_dump({device.type: rounded}, sort_keys=False, width=200), end="")


if __name__ == "__main__":
    main()
