"""What a training step on an H100 takes at least, by arithmetic: the bytes and products of each of
its parts, at the shapes of gpu_steps.py. No GPU is needed, and none has been asked.

    python tests/benchmarks/gpu_bytes.py

A row that a pair reads counts as read from memory, although some are in the cache. With bfloat16
values it has two bytes a number, with float32 values four. Where a code of bfloat16 is dense
(`dense_ops`), it is a matrix, which is filled with zeros, written and read.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_steps import SHAPES  # noqa: E402
from step import Shape  # noqa: E402

from sae_core.sae.dense_ops import DENSE_SHARE  # noqa: E402
from sae_core.train_config import OptimizerName  # noqa: E402

BYTES_PER_SECOND, PRODUCTS_PER_SECOND = 3.0e12, 7.9e14
"""Of an H100, as it reaches them."""

LAUNCH = 2e-6
"""Seconds of an operation in a graph."""

OPERATIONS = 110


def milliseconds(
    shape: Shape, value: int = 2, optimizer: OptimizerName = "adam"
) -> dict[str, float]:
    """Of each part, without dead features.

    Args:
        value: bytes of a number that pairs read.
    """
    n_moments = 4 if optimizer == "adam" else 3  # of encoder and decoder together
    n, d, width = shape.tokens, shape.d, shape.width
    matrix, tokens, code = 4 * d * width, 4 * n * d, 2 * n * width
    pairs = n * shape.k * d * value
    is_dense = value == 2 and shape.k > DENSE_SHARE * width
    moved = {
        "selection": 3 * code,  # counted, counted above the threshold, written
        "decode": 2 * code if is_dense else pairs,
        "dL/dvalue": code if is_dense else pairs,
        "gradients": (5 * code if is_dense else 2 * pairs) + 2 * matrix,
        "clipping": 3 * matrix,
        # Weights, gradients and moments read, all but the gradients written, and copies.
        "update": (2 * 3 + 2 * n_moments) * matrix + 2 * matrix / 2,
        "tokens": 24 * tokens,
    }
    n_products = 5 if is_dense else 1
    found = {"products": n_products * 2e3 * n * d * width / PRODUCTS_PER_SECOND}
    found |= {name: 1e3 * number / BYTES_PER_SECOND for name, number in moved.items()}
    return found | {"launches": 1e3 * OPERATIONS * LAUNCH}


def main() -> None:
    parts = list(milliseconds(SHAPES["A"]))
    further = "with float32 rows", "with `active_adam`"
    print("| d, F, k, N | " + " | ".join([*parts, "together", *further]) + " |")
    print("|---" + "|--:" * (len(parts) + 3) + "|")
    for shape in SHAPES.values():
        found = milliseconds(shape)
        others = milliseconds(shape, value=4), milliseconds(shape, optimizer="active_adam")
        numbers = [*found.values(), *(sum(each.values()) for each in (found, *others))]
        at = f"{shape.d:,}, {shape.width:,}, {shape.k}, {shape.tokens:,}"
        print(f"| {at} | " + " | ".join(f"{number:.2f}" for number in numbers) + " |")


if __name__ == "__main__":
    main()
