"""Training steps on an NVIDIA GPU: the machine's ceilings, a step's waits, operations and time, and
whether results are the same every time. `make gpu` runs it (gpu.py).

Fails if results differ, the host waits, or something of ours does not run, when all else has been
measured. Times are of the GPU, means over steps in a row; `ordinary` is the code of a CPU.
"""

import argparse
import gc
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from itertools import cycle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import step as peers  # noqa: E402
from gpu_tables import Row, table  # noqa: E402
from machine import DEVICE, describe  # noqa: E402
from operations import Operations  # noqa: E402
from step import LR, Shape, dead_features, our_sae  # noqa: E402

from sae_core.sae.normalisation import Normalisation  # noqa: E402
from sae_core.sae.precision import pick_precision  # noqa: E402
from sae_core.sae.reconstruction import Compute  # noqa: E402
from sae_core.sae.static.backend import backend_for  # noqa: E402
from sae_core.train_config import TrainingConfig  # noqa: E402
from sae_core.trainer.ahead import Captured  # noqa: E402
from sae_core.trainer.batches import Batch  # noqa: E402
from sae_core.trainer.events import Observer  # noqa: E402
from sae_core.trainer.optimizer import adam  # noqa: E402
from sae_core.trainer.static_step import StaticStep  # noqa: E402
from sae_core.training import Trainer  # noqa: E402

ON_GPU = DEVICE.type == "cuda" and torch.version.cuda is not None
SHAPES = {
    "A": Shape(576, 9216, 64, 4096),
    "A'": Shape(576, 9216, 64, 1024),
    "B": Shape(1024, 4096, 128, 4096),
    "C": Shape(512, 8192, 32, 4096),
    "D": Shape(2560, 40960, 128, 8192),
    "E": Shape(1024, 65536, 64, 8192),
}
LARGE = "DE"
TINY = Shape(64, 256, 4, 256)
N_STEPS = 50
MOST_STEPS = 10_000
"""That one static step of a benchmark takes; it has room for their figures."""
DENSEST = 5
"""Direction r (from 1) is drawn with weight 1 / (r + this): the first is on half of the tokens."""

Step = Callable[[Tensor], object]


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """Of the GPU, a call; three calls come before."""
    for _ in range(3):
        work()
    if not ON_GPU:
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        return 1e3 * (time.perf_counter() - began) / repeats
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def ceilings() -> Row:
    """(a) TFLOP/s of a large product, and GB/s of a copy (read and written)."""
    n = 8192 if ON_GPU else 256
    found: Row = {}
    torch.backends.cuda.matmul.allow_tf32 = False
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
        found[f"{dtype} product, TFLOP/s"] = 2 * n**3 / milliseconds(lambda: a @ b, 5) / 1e9  # noqa: B023
    source = torch.empty(2**28 if ON_GPU else 2**20, device=DEVICE)
    target = torch.empty_like(source)
    ms = milliseconds(lambda: target.copy_(source), 10)
    return found | {"copy, GB/s": 2 * source.nbytes / ms / 1e6}


@cache
def directions(shape: Shape) -> Tensor:
    """(2 F, D) of unit length; drawing them on a CPU takes seconds."""
    draw = torch.Generator(DEVICE).manual_seed(0)
    return F.normalize(torch.randn(2 * shape.width, shape.d, generator=draw, device=DEVICE), dim=1)


@cache
def batches(shape: Shape, skewed: bool) -> list[Tensor]:
    """As those of step.py; if `skewed`, of directions whose frequencies fall as in a real SAE."""
    draw, table = torch.Generator(DEVICE).manual_seed(1), directions(shape)
    weight = torch.ones(len(table), device=DEVICE)
    if skewed:
        weight /= torch.arange(len(table), device=DEVICE) + 1 + DENSEST
    found = []
    for _ in range(peers.N_BATCHES):
        which = torch.multinomial(weight, shape.tokens * 32, True, generator=draw).view(-1, 32)
        strength = torch.rand(which.shape, generator=draw, device=DEVICE)
        x = F.embedding_bag(which, table, per_sample_weights=strength, mode="sum")
        x += 0.02 * torch.randn(x.shape, generator=draw, device=DEVICE)
        found.append(x / x.pow(2).sum(1).mean().sqrt())
    return found


def static_step(shape: Shape, dead: bool, skewed: bool, dtype: str = "auto") -> StaticStep:
    """Of an SAE as training begins; if `skewed`, its features are the directions."""
    sae = our_sae(shape)
    if skewed:
        sae.W_dec.data.copy_(directions(shape)[: shape.width])
        sae.W_enc.data.copy_(sae.encoder_scale * sae.W_dec.data.T)
    if dead:
        sae.num_batches_not_active[dead_features(shape)] = 10**6
        sae.W_enc.data[:, dead_features(shape)] *= 0.1
    normalise = Normalisation(torch.zeros(shape.d, device=DEVICE), 1.0, 10.0)
    like = torch.empty(shape.tokens, shape.d, device=DEVICE)
    precision = pick_precision(dtype, DEVICE)
    given = adam(sae, LR), normalise, 1.0, precision, like, MOST_STEPS
    return StaticStep(sae, *given, backend_for(DEVICE))


class Fed:
    """A static step, begun, that takes the batch it is given."""

    def __init__(self, step: StaticStep, run: Callable[[], None]) -> None:
        self.step, self.run = step, run
        step.begin()

    def __call__(self, x: Tensor) -> None:
        self.step.feed(x, LR)
        self.run()

    def check(self) -> None:
        """A step that is not taken, and those after it, would be faster."""
        if self.step.halted:
            raise RuntimeError("a step was not taken")


def graph(shape: Shape, dead: bool, skewed: bool) -> Fed:
    step = static_step(shape, dead, skewed)
    return Fed(step, captured(step))


def captured(step: StaticStep) -> Callable[[], None]:
    return Captured(step) if ON_GPU else step.run


def eager(shape: Shape, dead: bool, skewed: bool) -> Fed:
    step = static_step(shape, dead, skewed)
    return Fed(step, step.run)


Contenders = Callable[[Shape, bool, bool], dict[str, Callable[[], Step] | None]]
"""What is timed at a shape, with dead features and with skewed frequencies or without. Each is made
when it is its turn, as not all of them fit into memory together."""


def ours(shape: Shape, dead: bool, skewed: bool) -> dict[str, Callable[[], Step] | None]:
    """What is beside the graph is timed without either."""
    beside: dict[str, Callable[[], Step]] = {
        "eager": lambda: eager(shape, dead, skewed),
        "ordinary": lambda: peers.ours(shape, "auto", dead),
        "bf16 product": lambda: product(shape),
    }
    is_plain = not (dead or skewed)
    return {
        "graph": lambda: graph(shape, dead, skewed),
        **{name: make if is_plain else None for name, make in beside.items()},
    }


def others(shape: Shape, dead: bool, skewed: bool) -> dict[str, Callable[[], Step] | None]:
    return {
        "sae-lens": lambda: peers.sae_lens(shape, dead),
        "dictionary-learning": lambda: peers.dictionary_learning(shape, dead),
    }


def product(shape: Shape) -> Step:
    W = torch.randn(shape.d, shape.width, device=DEVICE, dtype=torch.bfloat16)
    return lambda x: x.bfloat16() @ W


def of_ours() -> Iterator[Row]:
    """(c) Milliseconds of our steps."""
    for skewed, dead in ((False, False), (False, True), (True, False)):
        for name in SHAPES:
            yield times(ours, name, dead, skewed, 20 if name in LARGE else N_STEPS)


def of_peers() -> Iterator[Row]:
    """(c) Milliseconds of the peers' steps, which do not depend on frequencies."""
    for dead in (False, True):
        for name in SHAPES:
            if name not in LARGE:
                yield times(others, name, dead, False, 20)
            elif not dead:
                yield times(others, name, dead, False, 4)


def times(contenders: Contenders, name: str, dead: bool, skewed: bool, repeats: int) -> Row:
    """Milliseconds of a step; None where a library or memory is missing."""
    shape = SHAPES[name]
    data = batches(shape, skewed)
    row: Row = {"shape": name, "skewed": skewed, "dead": dead}
    for who, make in contenders(shape, dead, skewed).items():
        row[who] = timed(make, data, repeats) if make else None
    return row


def timed(make: Callable[[], Step], data: list[Tensor], repeats: int) -> float | str | None:
    """Milliseconds; "failed" where it does not run, which is printed."""
    try:
        return _steps_of(make, data, repeats)
    except (ImportError, torch.OutOfMemoryError):
        return None
    except Exception:
        traceback.print_exc()
        return "failed"
    finally:
        gc.collect()  # a trainer refers to itself
        torch.cuda.empty_cache()


def _steps_of(make: Callable[[], Step], data: list[Tensor], repeats: int) -> float:
    step, given = make(), cycle(data)
    found = milliseconds(lambda: step(next(given)), repeats)
    if isinstance(step, Fed):
        step.check()
    return found


def waits_and_operations() -> Row:
    """(b) Of 20 steps with and without dead features: questions to the device; and of one step:
    operations."""
    found: Row = {}
    shape = SHAPES["A"]
    for dtype in ("auto", "float32"):
        step = static_step(shape, True, False, dtype)
        x = batches(shape, False)[0].cpu()
        step.begin()
        with Operations() as counted:
            step.run()
        found[f"operations, {dtype}"] = len(counted.names)
        if not ON_GPU:
            continue
        take = Fed(step, captured(step))
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as asked:
            warnings.simplefilter("always")
            for _ in range(20):
                take(x)
        torch.cuda.set_sync_debug_mode("default")
        found[f"waits in 20 steps, {dtype}"] = sum("synchroniz" in str(w.message) for w in asked)
    return found


def final_bytes(as_graph: bool, dtype: str, skewed: bool) -> list[Tensor]:
    """The weights, moments and figures after 50 steps."""
    step = static_step(SHAPES["A"], True, skewed, dtype)
    run = captured(step) if as_graph else step.run
    step.begin()
    for x, _ in zip(cycle(batches(SHAPES["A"], skewed)), range(N_STEPS), strict=False):
        step.feed(x, LR)
        run()
    moments = [moment for both in step.moments for moment in both if moment is not None]
    return [step.W_enc, step.b_enc, step.W_dec, step.b_dec, *moments, step.record[:N_STEPS]]


def same_bytes() -> Iterator[Row]:
    """(d) 50 steps, eager and twice as a graph."""
    for dtype, skewed in (("auto", False), ("auto", True), ("float32", True)):
        eager_run, *graphs = (final_bytes(c, dtype, skewed) for c in (False, True, True))
        same = [
            all(
                torch.equal(a.nan_to_num(), b.nan_to_num())
                for a, b in zip(eager_run, other, strict=True)
            )
            for other in graphs
        ]
        taken = int(eager_run[-1][:, -1].sum())
        yield {
            "values": dtype, "skewed": skewed, "graph as eager": same[0],
            "graph again": same[1], "steps taken": taken, "some taken": taken > 0,
        }  # fmt: skip


def against_ordinary() -> Iterator[Row]:
    """The loss of the ordinary code's steps and of ours after 50 steps, float32 values."""
    for dead in (False, True):
        shape, data = SHAPES["A'"], batches(SHAPES["A'"], False)
        ours = static_step(shape, dead, False, "float32")
        sae = static_step(shape, dead, False).sae
        compute = Compute(precision=pick_precision("float32", DEVICE))
        trainer = Trainer(
            sae, peers.NoSource(1, 0, 1, 1, 0), TrainingConfig(), Observer(), compute,
            stepping="ordinary",
        )  # fmt: skip
        ours.begin()
        for x, _ in zip(cycle(data), range(N_STEPS), strict=False):
            ours.feed(x, LR)
            ours.run()
            terms, _ = trainer.step(Batch(x), LR)
        figures, right = ours.figures(N_STEPS)[-1], float(terms.loss)
        taken, loss = bool(figures.taken), float(figures.loss)
        alike = taken and abs(loss - right) < 1e-3 * right
        yield {"dead": dead, "static": loss, "ordinary": right, "taken": taken, "alike": alike}


def measure(only: str | None) -> list[str]:
    """All parts but the peers, or one; gives what is wrong."""
    wrong: list[str] = []
    if only in (None, "ceilings"):
        table("ceilings", (work() for work in [ceilings]), wrong)
    if only in (None, "bytes"):
        rows = table("bytes", same_bytes(), wrong) + table("ordinary", against_ordinary(), wrong)
        checks = "graph as eager", "graph again", "some taken", "alike"
        wrong += [str(row) for row in rows if not all(row.get(name, True) for name in checks)]
    if only in (None, "waits"):
        for found in table("waits", (work() for work in [waits_and_operations]), wrong):
            wrong += [name for name, number in found.items() if "waits" in name and number]
    if only in (None, "steps"):
        rows = table("steps", of_ours(), wrong)
        wrong += [str(row) for row in rows if "failed" in row.values()]
    if only == "peers":
        table("peers", of_peers(), wrong)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = ["ceilings", "bytes", "waits", "steps", "peers"]
    parser.add_argument("--only", choices=parts, help="one part")
    parser.add_argument("--tiny", action="store_true", help="small shapes, on any machine: a trial")
    options = parser.parse_args()
    if not (options.tiny or ON_GPU):
        print("gpu_steps.py: this machine has no NVIDIA GPU, so there is nothing to measure")
        return
    if options.tiny:
        used = "A", "A'"
        SHAPES.clear()
        SHAPES.update(dict.fromkeys(used, TINY))
    print(describe("triton", "sae-lens", "dictionary-learning"))
    if wrong := measure(options.only):
        sys.exit("results differ, the host waits, or a part fails: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
