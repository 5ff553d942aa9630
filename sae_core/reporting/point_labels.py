"""Where the names of points stand in a plot: near them, covering as little as possible."""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath

LABEL_SIZE, NEAR = 10, 6
"""The type size of a point's label, and the distance up to which it needs no line, in
points."""

Look = dict[str, Any]
"""Settings of something that is drawn, as matplotlib names them."""

LABEL_BOX: Look = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 0.5}


def place_labels(
    figure: Figure, axes: Axes, points: np.ndarray, labels: Sequence[str], line_colour: str
) -> None:
    """Write each label near its point, where it covers least; a line leads to distant labels."""
    figure.draw_without_rendering()  # settles the layout
    frame = np.array(axes.get_window_extent().extents)
    at = axes.transData.transform(points)
    taken = [np.array((x - 5, y - 5, x + 5, y + 5)) for x, y in at]
    for point, (x, y), label in zip(points, at, labels, strict=True):
        size = np.array(TextPath((0, 0), label, size=LABEL_SIZE).get_extents().size) + (4, 3)
        boxes = {offset: _box(x, y, offset, size) for offset in _offsets(size)}
        offset = min(boxes, key=lambda o: _covered(boxes[o], taken, frame))
        taken.append(boxes[offset])
        where: Look = {"xy": point, "xytext": offset, "textcoords": "offset points"}
        look: Look = {"ha": "center", "va": "center", "fontsize": LABEL_SIZE, "in_layout": False}
        if max(np.abs(offset) - size / 2) > NEAR + 1:
            line: Look = {"arrowstyle": "-", "color": line_colour, "linewidth": 0.5, "shrinkB": 0}
            axes.annotate("", **where, **look, arrowprops=line, zorder=1)
        axes.annotate(label, **where, **look, bbox=LABEL_BOX)


def _offsets(size: np.ndarray) -> Iterator[tuple[float, float]]:
    """Possible positions of a label's centre relative to its point, the nearest first."""
    sides = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
    for distance, (right, up) in product((NEAR, 14, 24, 36, 50, 66), sides):
        yield right * (distance + size[0] / 2), up * (distance + size[1] / 2)


def _box(x: float, y: float, offset: tuple[float, float], size: np.ndarray) -> np.ndarray:
    middle = np.array((x, y)) + offset
    return np.concatenate((middle - size / 2, middle + size / 2))


def _covered(box: np.ndarray, taken: Sequence[np.ndarray], frame: np.ndarray) -> float:
    """The area of `taken` that a box (left, bottom, right, top) covers, and ten times that of the
    part of it outside the frame."""
    inside = _overlap(box, np.array([frame]))
    area = (box[2] - box[0]) * (box[3] - box[1])
    return round(_overlap(box, np.array(taken)) + 10 * (area - inside), 3)


def _overlap(box: np.ndarray, others: np.ndarray) -> float:
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    return float(sides.clip(min=0).prod(axis=1).sum())
