"""Where the time of our training step goes: milliseconds by operation, beside the bare product.

Prints a Markdown table for each shape (d, F, k), at 4,096 tokens per step; `rest` sums up what is
small.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from itertools import cycle

from machine import describe
from step import EARLY_STEPS, SHAPES, Shape, bare_product, batches, measure, ours
from torch.profiler import ProfilerActivity, profile

STEPS = 5
SHOWN = 12
"""Operations with a line of their own."""


def by_operation(shape: Shape, compute_dtype: str) -> Counter[str]:
    """Milliseconds per step of each operation, without those that it calls."""
    step, data = ours(shape, compute_dtype, dead=False), cycle(batches(shape))
    for _ in range(EARLY_STEPS):
        step(next(data))
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(STEPS):
            step(next(data))
    times = Counter()
    for event in found.key_averages():
        times[event.key.removeprefix("aten::")] += event.self_cpu_time_total / 1e3 / STEPS
    return times


def table(shape: Shape) -> Iterator[str]:
    product = measure({"product": bare_product(shape)}, shape, STEPS)["product"]
    times = {dtype: by_operation(shape, dtype) for dtype in ("float32", "auto")}
    yield f"\n{shape.d}, {shape.width:,}, {shape.k}; the bare product takes {product:.0f} ms\n"
    yield "| operation | float32 | auto |\n|---|--:|--:|"
    total = sum(times.values(), Counter())
    shown = [name for name, _ in total.most_common(SHOWN)]
    for name in shown:
        yield f"| `{name}` | {times['float32'][name]:.1f} | {times['auto'][name]:.1f} |"
    rest = [sum(t.values()) - sum(t[name] for name in shown) for t in times.values()]
    yield f"| rest | {rest[0]:.1f} | {rest[1]:.1f} |"
    yield f"| all | {sum(times['float32'].values()):.1f} | {sum(times['auto'].values()):.1f} |"


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(f"A training step by operation, milliseconds ({describe()})")
    for shape in SHAPES:
        if shape.tokens == max(s.tokens for s in SHAPES):
            for line in table(shape):
                print(line, flush=True)


if __name__ == "__main__":
    main()
