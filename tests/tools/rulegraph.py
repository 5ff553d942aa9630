"""Print the workflow's rule graph as an SVG, without graphviz: python tests/tools/rulegraph.py

Snakemake says which rule feeds which (`--rulegraph`, for config/demo.yaml). The layout is made
here: a column for each step away from the sources; edges that pass over a column go through slots
of their own in it; the order within columns is one with few crossings. The picture is
transparent and every box brings its own background, for light and dark pages alike. Graphviz would
need its program `dot`, which pip does not install, and each version of it draws something else.
"""

import random
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import combinations, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from sae_core.models.model_sources import ModelRecord

ROOT = Path(__file__).resolve().parents[2]
COMMAND = "--configfile config/demo.yaml --rulegraph --nolock".split()
TIMEOUT = 120

WHAT = {
    "process": "chapters to texts",
    "fetch": "the language model",
    "tokenize": "once a tokenizer",
    "harvest": "one pass, all layers",
    "train": "one SAE a job",
    "evaluate": "on held-out windows",
    "features": "what they are about",
    "browse": "pages of features",
    "plot": "losses, densities",
    "summarise": "table and page",
}
"""What stands under a rule's name, in the order in which a reader meets the rules."""

COLUMN_STYLE = (
    ("#dcebfa", "#4078b0"),
    ("#d8f0ee", "#2b8a82"),
    ("#e0f1d9", "#55933b"),
    ("#fbefce", "#b08416"),
    ("#f9e0da", "#bc5f45"),
)
"""Background and border of a column's boxes; further columns begin again."""

LEFT_OUT = {"all", "list_runs"}
"""Rules that only hold others together."""

LINE, NAME, NOTE = "#8c959f", "#1f2328", "#57606a"
BOX_WIDTH, BOX_HEIGHT, SLOT_HEIGHT = 134, 46, 12
COLUMN_GAP, ROW_GAP, MARGIN = 48, 20, 8

STARTS = 12
"""Orders that the search for the best one begins with."""


class Item(NamedTuple):
    """A rule's box, or the slot through which an edge passes a column."""

    rule: str
    target: str = ""
    """For a slot: where its edge leads."""


Edge = tuple[str, str]
Column = tuple[Item, ...]
Links = list[tuple[Item, Item]]
"""Pieces of edges, each from one column to the next."""


def read_dot(dot: str) -> list[Edge]:
    """The edges between rules."""
    names = dict(re.findall(r'^\s*(\d+)\[label = "([^"\\]+)', dot, flags=re.MULTILINE))
    pairs = re.findall(r"^\s*(\d+) -> (\d+)", dot, flags=re.MULTILINE)
    edges = [(names[a], names[b]) for a, b in pairs]
    return sorted(edge for edge in edges if not LEFT_OUT & set(edge))


def depths(edges: list[Edge]) -> dict[str, int]:
    """The column of each rule: the length of the longest way to it."""
    order = [*WHAT, *sorted({rule for edge in edges for rule in edge} - set(WHAT))]
    depth = {rule: 0 for rule in order if any(rule in edge for edge in edges)}
    for _ in depth:
        for a, b in edges:
            depth[b] = max(depth[b], depth[a] + 1)
    return depth


def columns_and_links(edges: list[Edge]) -> tuple[list[Column], Links]:
    """Every column's boxes and slots, and the links between neighbouring columns."""
    depth = depths(edges)
    columns: list[list[Item]] = [[] for _ in range(max(depth.values()) + 1)]
    for rule, column in depth.items():
        columns[column].append(Item(rule))
    links: Links = []
    for a, b in edges:
        slots = [Item(a, b)] * (depth[b] - depth[a] - 1)
        for column, slot in enumerate(slots, depth[a] + 1):
            columns[column].append(slot)
        links += pairwise([Item(a), *slots, Item(b)])
    return [tuple(column) for column in columns], links


def heights(columns: list[Column]) -> list[dict[Item, float]]:
    """The y of every item: columns are centred; neighbouring slots of one rule share a place."""
    placed = []
    for column in columns:
        y, at, last = 0.0, {}, Item("")
        for item in column:
            shares = item.target and last.target and item.rule == last.rule
            if not shares:
                size = SLOT_HEIGHT if item.target else BOX_HEIGHT
                y += size + (ROW_GAP if at else 0)
                middle = y - size / 2
            at[item] = middle
            last = item
        placed.append({item: value - y / 2 for item, value in at.items()})
    return placed


def cost(columns: list[Column], links: Links) -> tuple[int, float, int]:
    """Crossings, then how far the links climb, then rules out of the reader's order."""
    ys = heights(columns)
    crossings, climb = 0, 0.0
    for left, right in pairwise(ys):
        here = [(left[a], right[b]) for a, b in set(links) if a in left and b in right]
        climb += sum(abs(y0 - y1) for y0, y1 in here)
        crossings += sum(p[0] < q[0] and p[1] > q[1] for p in here for q in here)
    ranks = [[rank for item in c if (rank := _rank(item)) is not None] for c in columns]
    inversions = sum(a > b for column in ranks for a, b in combinations(column, 2))
    return crossings, round(climb, 3), inversions


def _rank(item: Item) -> int | None:
    return None if item.target else [*WHAT, item.rule].index(item.rule)


def moves(column: Column) -> Iterator[Column]:
    """The column as it is, and with one item at another place."""
    yield column
    for i, item in enumerate(column):
        rest = column[:i] + column[i + 1 :]
        for place in range(len(column)):
            yield (*rest[:place], item, *rest[place:])


def arrange(columns: list[Column], links: Links) -> list[Column]:
    """The best of the orders that are found from several at random."""
    draw = random.Random(0)
    starts = [[tuple(draw.sample(c, len(c))) for c in columns] for _ in range(STARTS)]
    found = [improve(start, links) for start in starts]
    return min(found, key=lambda option: cost(option, links))


def improve(columns: list[Column], links: Links) -> list[Column]:
    """Reorder one column after the other, and turn the first ones upside down, while it helps."""
    while True:
        before = cost(columns, links)
        turned = [
            [*(column[::-1] for column in columns[:i]), *columns[i:]]
            for i in range(len(columns) + 1)
        ]
        columns = min(turned, key=lambda option: cost(option, links))
        for i, column in enumerate(columns):
            others = columns[:i], columns[i + 1 :]
            columns = min(
                ([*others[0], order, *others[1]] for order in moves(column)),
                key=lambda option: cost(option, links),
            )
        if cost(columns, links) == before:
            return columns


def draw(edges: list[Edge]) -> str:
    """The picture."""
    columns, links = columns_and_links(edges)
    columns = arrange(columns, links)
    ys = heights(columns)
    extent = max(max(abs(y) for y in column.values()) for column in ys) + BOX_HEIGHT / 2
    width = len(columns) * (BOX_WIDTH + COLUMN_GAP) - COLUMN_GAP + 2 * MARGIN
    height = 2 * (extent + MARGIN)
    place = {
        (i, item): (MARGIN + i * (BOX_WIDTH + COLUMN_GAP), y + height / 2)
        for i, column in enumerate(ys)
        for item, y in column.items()
    }
    lines, boxes = {}, []
    for (i, item), (x, y) in place.items():
        if item.target:
            lines[f"M{x:g},{y:g} h{BOX_WIDTH}"] = ""
        else:
            boxes += _box(item.rule, x, y, COLUMN_STYLE[i % len(COLUMN_STYLE)])
        for a, b in links:
            if a == item and (end := place.get((i + 1, b))):
                start, gap = x + BOX_WIDTH, COLUMN_GAP - (0 if b.target else 5)
                bend = COLUMN_GAP / 2
                lines[
                    f"M{start:g},{y:g} c{bend:g},0 {gap - bend:g},{end[1] - y:g} "
                    f"{gap:g},{end[1] - y:g}"
                ] = "" if b.target else ' marker-end="url(#tip)"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
            f'width="{width:g}" height="{height:g}" role="img" '
            'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
            "<title>The rules of the workflow, and which feeds which</title>",
            '<marker id="tip" viewBox="0 0 8 8" refX="3" refY="4" markerWidth="8" '
            f'markerHeight="8" markerUnits="userSpaceOnUse" orient="auto"><path d="M0,0 L8,4 '
            f'L0,8 Z" fill="{LINE}"/></marker>',
            f'<g fill="none" stroke="{LINE}" stroke-width="1.6">',
            *(f'<path d="{path}"{tip}/>' for path, tip in sorted(lines.items())),
            "</g>",
            *boxes,
            "</svg>\n",
        ]
    )


def _box(rule: str, x: float, y: float, style: tuple[str, str]) -> list[str]:
    centre, note = x + BOX_WIDTH / 2, WHAT.get(rule, "")
    box = [
        f'<rect x="{x:g}" y="{y - BOX_HEIGHT / 2:g}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" '
        f'rx="9" fill="{style[0]}" stroke="{style[1]}" stroke-width="1.5"/>',
        f'<text x="{centre:g}" y="{y - 2 if note else y + 5:g}" text-anchor="middle" '
        f'font-size="14" font-weight="600" fill="{NAME}">{rule}</text>',
    ]
    if note:
        box.append(
            f'<text x="{centre:g}" y="{y + 14:g}" text-anchor="middle" font-size="11" '
            f'fill="{NOTE}">{note}</text>'
        )
    return box


RECORD = ModelRecord(
    name="SmolLM2-135M-Instruct",
    source="wheel",
    commit=None,
    path=".",
    n_layers=30,
    d_model=576,
    hook_names=["hook_resid_post"],
    tokenizer_sha256="0" * 64,
)
"""Which rules follow the fetch is known only when a model's tokenizer is."""


def rulegraph() -> str:
    """What Snakemake prints, in a folder where the example's model has been fetched."""
    with TemporaryDirectory() as folder:
        for name in ("workflow", "config", "sae_core", "scripts", "envs"):
            Path(folder, name).symlink_to(ROOT / name)
        record = Path(folder, f"results/models/{RECORD.name}.json")
        record.parent.mkdir(parents=True)
        RECORD.save(record)
        done = subprocess.run(
            [sys.executable, "-m", "snakemake", *COMMAND],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


if __name__ == "__main__":
    print(draw(read_dot(rulegraph())), end="")
