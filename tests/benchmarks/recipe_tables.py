"""The tables of docs/recipe.md that are made from the records of trainings: `make recipe`."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from our_training import OURS, automatic, two_digits
from trial_records import Figures, Record, Records, Settings

from sae_core.utils.files import write_file

ROOT = Path(__file__).resolve().parents[2]
RECIPE, IDEAS = ROOT / "docs/recipe.md", Path(__file__).parent / "ideas.yaml"
BLOCK = re.compile(r"(?<=<!-- made by make recipe: )(\S+) -->.*?(?=<!-- end -->)", re.DOTALL)
BASELINE = "recipe"
"""The contender that most ideas are compared with: the default recipe, by the code that they were
tried with."""
D_IN = 576
"""The width of the activations that all records are of."""
Pair = tuple[int, float]
"""Tokens per step, and the learning rate with two digits."""
MEANS = "calibration_fvu", "fvu", "dead", "own_fvu", "own_l0"


@dataclass(frozen=True)
class Idea:
    """Something that was tried."""

    name: str
    """The contender of its records; empty if there are none."""
    what: str
    source: str
    verdict: str
    against: str = BASELINE
    """The contender that it is compared with."""


@dataclass(frozen=True)
class Setup:
    """What trainings have to share to be compared."""

    hook: str
    features: int
    k: int
    tokens_per_step: int
    tokens: int
    data: str
    tokens_to_dead: int

    @classmethod
    def of(cls, settings: Settings) -> "Setup":
        return cls(**{name: getattr(settings, name) for name in cls.__dataclass_fields__})

    @property
    def layer(self) -> int:
        return int(self.hook.split(".")[1])

    @property
    def place(self) -> tuple[int, ...]:
        """Where it stands in a table."""
        return self.layer, self.features, self.k, self.tokens, self.tokens_per_step


@dataclass(frozen=True)
class Best:
    """A contender at its best learning rate, its figures averaged over the seeds."""

    lr: float
    seeds: frozenset[int]
    calibration_fvu: float
    fvu: float
    dead: float
    own_fvu: float | None
    own_l0: float | None

    @classmethod
    def of(cls, records: Iterable[Record]) -> "Best":
        """Of the rates that most seeds have, the one with the least FVU on the calibration
        tokens."""
        by_rate: dict[float, list[Record]] = {}
        for record in records:
            by_rate.setdefault(record.settings.lr, []).append(record)

        def merit(lr: float) -> tuple[int, float]:
            found = by_rate[lr]
            return -len(found), fmean(record.figures.calibration_fvu for record in found)

        lr = min(by_rate, key=merit)
        figures = [record.figures for record in by_rate[lr]]
        means = {name: _mean(figures, name) for name in MEANS}
        return cls(lr, frozenset(record.settings.seed for record in by_rate[lr]), **means)


def _mean(figures: list[Figures], name: str) -> Any:
    values = [getattr(each, name) for each in figures]
    return None if None in values else fmean(values)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def contenders_table(records: Iterable[Record]) -> str:
    """Each contender at each step size; the last column compares it with ours at the same."""
    by_setup: dict[Setup, dict[str, list[Record]]] = {}
    for record in records:
        by_name = by_setup.setdefault(Setup.of(record.settings), {})
        by_name.setdefault(record.settings.contender, []).append(record)
    lines = [
        "| layer | features | k | tokens | per step | SAE | learning rate | FVU at L0 k | dead "
        "| at its own threshold: FVU | L0 | ours over it |",
        "|--:" * 5 + "|---" + "|--:" * 6 + "|",
    ]
    for setup, by_name in sorted(by_setup.items(), key=lambda item: item[0].place):
        bests = {name: Best.of(found) for name, found in by_name.items()}
        for name, best in bests.items():
            ratio = f"{bests['ours'].fvu / best.fvu:.3f}" if "ours" in bests else ""
            lines.append(
                f"| {setup.layer} | {setup.features:,} | {setup.k} | {setup.tokens:,} "
                f"| {setup.tokens_per_step:,} | {name} | {best.lr:.2g} | {best.fvu:.4f} "
                f"| {best.dead:.1%} | {_number(best.own_fvu, 4)} | {_number(best.own_l0, 1)} "
                f"| {ratio} |"
            )
    return "\n".join(lines)


def bests_table(records: Iterable[Record]) -> str:
    """Each contender at its best step size and learning rate, by the calibration tokens, beside the
    best of ours; where a peer has been run."""
    by_task: dict[Setup, dict[str, dict[int, list[Record]]]] = {}
    for record in records:
        by_name = by_task.setdefault(replace(Setup.of(record.settings), tokens_per_step=0), {})
        by_size = by_name.setdefault(record.settings.contender, {})
        by_size.setdefault(record.settings.tokens_per_step, []).append(record)
    lines = [
        "| layer | features | k | tokens | SAE | trials | per step | learning rate | FVU at L0 k "
        "| dead | the best of ours has less by |",
        "|--:" * 4 + "|---" + "|--:" * 6 + "|",
    ]
    for task, by_name in sorted(by_task.items(), key=lambda item: item[0].place):
        bests = {name: _at_best_size(by_size) for name, by_size in by_name.items()}
        ours = [name for name in bests if name.startswith("ours")]
        if not ours or len(ours) == len(bests):
            continue
        leader = min(ours, key=lambda name: bests[name][1].calibration_fvu)
        for name, by_size in by_name.items():
            size, best = bests[name]
            trials = len({replace(r.settings, seed=0) for r in chain(*by_size.values())})
            less = "" if name == leader else f"{1 - bests[leader][1].fvu / best.fvu:.1%}"
            lines.append(
                f"| {task.layer} | {task.features:,} | {task.k} | {task.tokens:,} | {name} "
                f"| {trials} | {size:,} | {best.lr:.2g} | {best.fvu:.4f} | {best.dead:.1%} "
                f"| {less} |"
            )
    return "\n".join(lines)


def _at_best_size(by_size: dict[int, list[Record]]) -> tuple[int, Best]:
    bests = {size: Best.of(records) for size, records in by_size.items()}
    return min(bests.items(), key=lambda item: item[1].calibration_fvu)


def auto_table(records: Iterable[Record]) -> str:
    """Each of our trainings with `tokens_per_step` and `lr` as `auto` has them, beside the best of
    the others in the same setting; where both have been run, on the seeds that both have."""
    by_task: dict[tuple[str, Setup], dict[Pair, list[Record]]] = {}
    for record in records:
        if record.settings.contender in OURS:
            task = replace(Setup.of(record.settings), tokens_per_step=0)
            pair = record.settings.tokens_per_step, two_digits(record.settings.lr)
            by_pair = by_task.setdefault((record.settings.contender, task), {})
            by_pair.setdefault(pair, []).append(record)
    lines = [
        "| SAE | layer | features | k | tokens | `auto`: per step | learning rate | FVU at L0 k "
        "| dead | s | best of the grid: per step | learning rate | FVU at L0 k | dead | s "
        "| its trials | `auto` over it |",
        "|---" + "|--:" * 16 + "|",
    ]
    for (name, task), by_pair in sorted(by_task.items(), key=lambda it: (it[0][0], it[0][1].place)):
        auto = automatic(OURS[name], D_IN, task.features, task.k, task.tokens)
        others = {pair: found for pair, found in by_pair.items() if pair != auto}
        if auto in by_pair and others:
            lines.append(f"| {name} {_auto_beside(task, auto, by_pair[auto], others)}")
    return "\n".join(lines)


def _auto_beside(
    task: Setup,
    auto: Pair,
    records: list[Record],
    others: dict[Pair, list[Record]],
) -> str:
    """A line of `auto_table`, without the contender."""
    seeds = {record.settings.seed for record in records}
    same = {pair: [r for r in found if r.settings.seed in seeds] for pair, found in others.items()}
    most = max(map(len, same.values()))
    whole = {pair: found for pair, found in same.items() if len(found) == most}
    best = min(whole, key=lambda pair: _figure(whole[pair], "calibration_fvu"))
    shared = {record.settings.seed for record in whole[best]}
    own = [record for record in records if record.settings.seed in shared]

    def cells(pair: Pair, found: list[Record]) -> str:
        return (
            f"| {pair[0]:,} | {pair[1]:.2g} | {_figure(found, 'fvu'):.4f} "
            f"| {_figure(found, 'dead'):.1%} | {_figure(found, 'seconds'):.0f} "
        )

    ratio = _figure(own, "fvu") / _figure(whole[best], "fvu")
    return (
        f"| {task.layer} | {task.features:,} | {task.k} | {task.tokens:,} {cells(auto, own)}"
        f"{cells(best, whole[best])}| {len(whole)} | {ratio:.3f} |"
    )


def _figure(records: list[Record], name: str) -> float:
    return fmean(getattr(record.figures, name) for record in records)


def ideas_table(ideas: Iterable[Idea], records: Iterable[Record]) -> str:
    """Each idea in each setup, beside the recipe in the same."""
    by_name: dict[str, dict[Setup, list[Record]]] = {}
    for record in records:
        by_setup = by_name.setdefault(record.settings.contender, {})
        by_setup.setdefault(Setup.of(record.settings), []).append(record)
    lines = [
        "| tried | layer | tokens | per step | dead after | learning rate | FVU at L0 32 "
        "| without it | less by | dead | without it | verdict |",
        "|---" + "|--:" * 10 + "|---|",
    ]
    for idea in ideas:
        first = f"{idea.what} ({idea.source})" if idea.source else idea.what
        setups = by_name.get(idea.name, {})
        cells = list(_beside(setups, by_name.get(idea.against, {}))) or ["| " * 10]
        verdicts = [idea.verdict, *[""] * (len(cells) - 1)]
        for cell, verdict in zip(cells, verdicts, strict=True):
            lines.append(f"| {first} {cell}| {verdict} |")
            first = ""
    return "\n".join(lines)


def _beside(
    setups: dict[Setup, list[Record]], baseline: dict[Setup, list[Record]]
) -> Iterator[str]:
    """The cells of an idea, a line a setup; compared on the seeds that both have."""
    for setup, records in setups.items():
        idea = Best.of(records)
        same = [record for record in baseline[setup] if record.settings.seed in idea.seeds]
        other = Best.of(same)
        yield (
            f"| {setup.layer} | {setup.tokens:,} | {setup.tokens_per_step:,} "
            f"| {setup.tokens_to_dead:,} | {idea.lr:g} "
            f"| {idea.fvu:.4f} | {other.fvu:.4f} | {1 - idea.fvu / other.fvu:.1%} "
            f"| {idea.dead:.1%} | {other.dead:.1%} "
        )


def with_tables(text: str, records: list[Record]) -> str:
    """A page with its tables made anew."""
    ideas = [Idea(**entry) for entry in yaml.safe_load(IDEAS.read_text(encoding="utf-8"))["ideas"]]
    tried = {name for idea in ideas for name in (idea.name, idea.against)}
    contenders = [record for record in records if record.settings.contender not in tried]
    tables = {
        "bests": bests_table(contenders),
        "contenders": contenders_table(contenders),
        "ideas": ideas_table(ideas, records),
        "auto": auto_table(records),
    }
    return BLOCK.sub(lambda block: f"{block[1]} -->\n{tables[block[1]]}\n", text)


def main() -> None:
    """Write the tables."""
    page = with_tables(RECIPE.read_text(encoding="utf-8"), Records().all())
    write_file(RECIPE, page)


if __name__ == "__main__":
    main()
