"""Tables of `make gpu`: printed and stored row by row, so that a run that is cut leaves them."""

import json
import traceback
from collections.abc import Iterator
from typing import Any

from gpu import OUTPUT
from machine import describe

Row = dict[str, Any]


def table(name: str, rows: Iterator[Row], wrong: list[str]) -> list[Row]:
    """Print and store a table; what stops it is printed and noted in `wrong`, and the caller goes
    on."""
    shown: list[Row] = []
    try:
        for row in rows:
            shown.append(row)
            _print(name, shown)
            _store(name, shown, whole=False)
        _store(name, shown, whole=True)
    except Exception as error:
        traceback.print_exc()
        wrong.append(f"{name}: {error!r}")
    return shown


def _print(name: str, rows: list[Row]) -> None:
    """The last row, and the head before the first."""
    if len(rows) == 1:
        print(f"\n{name}\n\n| {' | '.join(rows[0])} |\n|---" + "|---" * (len(rows[0]) - 1) + "|")
    cells = (f"{v:.3g}" if isinstance(v, float) else str(v) for v in rows[-1].values())
    print(f"| {' | '.join(cells).replace('None', '-')} |", flush=True)


def _store(name: str, rows: list[Row], whole: bool) -> None:
    OUTPUT.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": describe(), "whole": whole, "rows": rows}, indent=1)
    path = OUTPUT / f"{name}.json"
    path.with_suffix(".part").write_text(text + "\n", encoding="utf-8")
    path.with_suffix(".part").replace(path)
