"""Compile the kernels for sm_90, which needs no GPU, and print as JSON what each uses: registers a
thread, bytes of stack, bytes of shared memory, and instructions that make it slow: loads of two
bytes, where a matrix of bfloat16 is not read 16 bytes at a time, and waits for all of its writes.

    python tests/tools/compile_kernels.py [WIDTH ...]
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from sae_core.sae import kl_kernel  # noqa: E402
from sae_core.sae.static import (  # noqa: E402
    pair_kernels,
    row_kernels,
    scalar_kernels,
    select_kernels,
    update_kernels,
)

TARGET = GPUTarget("cuda", 90, 32)
INT, FLOAT = "i32", "fp32"
INTS, SHORTS, LONGS, FLOATS, HALVES, BOOLS = "*i32", "*i16", "*i64", "*fp32", "*bf16", "*i1"

TYPES = {
    **dict.fromkeys("N D F FIRST ASIDE vocabulary".split(), INT),
    **dict.fromkeys(
        "scale max_norm target_scale target_max_norm beta1 beta2 eps log_beta1 log_beta2 "
        "recon_weight l1_weight aux_weight max_length".split(),
        FLOAT,
    ),
    **dict.fromkeys("rows columns kept some finite sure halted".split(), BOOLS),
    **dict.fromkeys(
        "total floor seen count limits numbers before row_of column_of start column begin "
        "first_segment feature_of aside_of row n n_pairs aux_total".split(),
        INTS,
    ),
    "pre": SHORTS,
    "order": LONGS,
    "lr": "*fp64",
    **dict.fromkeys(["copy", "half", "raw", "clean", "spliced"], HALVES),
}
"""Of arguments by name; all others are pointers to float32."""

MULTIPLES = {"D", "F", "N", "vocabulary"}
"""Sizes that are usually multiples of 16."""


def compiled(
    kernel: Any, warps: int, constants: dict[str, Any], halves: str = ""
) -> dict[str, int]:
    """What a kernel uses with these constants, and some of its matrices in bfloat16."""
    names, types = kernel.arg_names, TYPES | dict.fromkeys(halves, HALVES)
    signature = {
        name: "constexpr" if name in constants else types.get(name, FLOATS) for name in names
    }
    if "record" in names:
        signature["at"] = LONGS  # the line that comes next
    aligned = [name for name in names if signature[name].startswith("*") or name in MULTIPLES]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return resources(triton.compile(source, target=TARGET, options={"num_warps": warps}))


def resources(kernel: Any) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", "--dump-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    assert found, text
    used = dict(zip(("registers", "stack", "shared"), map(int, found.groups()), strict=True))
    return used | {"narrow loads": text.count("LDG.E.U16"), "fences": text.count("MEMBAR")}


def kernels_of(d: int) -> dict[str, tuple[Any, ...]]:
    """Every kernel, its warps and constants as the functions beside it give them, and the names of
    its matrices that are in bfloat16 if values are."""
    whole = triton.next_power_of_2(d)
    tile, segment = {"TILE": select_kernels.TILE}, {"SEGMENT": pair_kernels.SEGMENT}
    wide, block = {"WIDE": pair_kernels.WIDE}, {"BLOCK": min(512, whole)}
    few = {"WIDE": max(1, min(pair_kernels.WIDE, 4096 // whole)), "BLOCK": whole}
    sampled, segments = (pair_kernels._sampled, 4 if d <= 2048 else 8, few), segment | wide | block
    decode = pair_kernels._decode, 4, wide | {"BLOCK": min(1024, whole)}
    adding = pair_kernels._segments, 4, segments
    patterns = {"PATTERNS": select_kernels.PATTERNS, "BELOW": select_kernels.BELOW}
    active, copied = {"ONLY_ACTIVE": True}, {"COPIED": True, "BLOCK": whole}
    decoder, turned, encoder = (
        {"DECODER": own, "NORMALISED": no_second, "ONLY_ACTIVE": no_second or not own} | copied
        for own, no_second in ((True, False), (True, True), (False, False))
    )
    counting, warps = select_kernels._count_patterns, update_kernels._warps(d)
    return {
        "prepare": (row_kernels._prepare, warps, {"SITES": 2, "BLOCK": whole}),
        "errors": (row_kernels._errors, warps, {"BLOCK": whole}),
        "spread": (row_kernels._spread, warps, {"BLOCK": whole}),
        "count above": (counting, 4, tile | {"ABOVE": True}),
        "count below": (counting, 4, tile | {"ABOVE": False}),
        "threshold": (select_kernels._threshold, 32, patterns),
        "count kept": (select_kernels._count_kept, 4, tile),
        "write kept": (select_kernels._write_kept, 4, tile),
        "decode": decode,
        "decode in bfloat16": (*decode, "W"),
        "sampled": sampled,
        "sampled in bfloat16": (*sampled, "W"),
        "segments": adding,
        "segments in bfloat16": (*adding, "GX"),
        "add segments": (pair_kernels._add_segments, 4, segment | block),
        "squares": (update_kernels._squares, warps, {"BLOCK": whole}),
        "decoder": (update_kernels._move_rows, warps, decoder),
        "decoder, normalised steps": (update_kernels._move_rows, warps, turned),
        "encoder": (update_kernels._move_rows, warps, encoder),
        "terms": (scalar_kernels._terms, 1, {}),
        "decide": (scalar_kernels._decide, 1, {"FIGURES": scalar_kernels.FIGURES}),
        "bias": (update_kernels._move_vector, 4, active | {"BLOCK": 1024}),
        "kl": (kl_kernel._kl, kl_kernel.WARPS, {"GRADIENT": True, "BLOCK": kl_kernel.BLOCK}),
    }


def main() -> None:
    found = {
        f"{name}, d = {d}": compiled(*how)
        for d in map(int, sys.argv[1:] or ["1024"])
        for name, how in kernels_of(d).items()
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
