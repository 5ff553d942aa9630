"""The costs of jobs, one by one and added up, as a table."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sae_core.workflow.plan_tables import Machine

LIGHT_GB, LIGHT_SECONDS = 0.2, 1.5
"""A job that only reads and writes small files."""


class Cost(NamedTuple):
    """One job."""

    rule: str
    name: str
    tokens: float
    flops: float
    disk: float
    """Bytes that it leaves."""
    memory: float
    """Bytes that it needs at once."""
    seconds: float


def light(rule: str, name: str) -> Cost:
    """A job that neither runs nor trains a model."""
    return Cost(rule, name, 0, 0, 0, LIGHT_GB * 1e9, LIGHT_SECONDS)


def table(costs: Iterable[Cost], machine: Machine) -> str:
    """All jobs, the sum per rule, and the total; `!` if a job's memory exceeds the
    machine's."""
    costs = list(costs)
    rules = list(dict.fromkeys(cost.rule for cost in costs))
    sums = [_sum(rule, [cost for cost in costs if cost.rule == rule]) for rule in rules]
    whole = _sum("all", costs)
    width = max(len(cost.name) for cost in [*costs, *sums])
    head = f"{'rule':9} {'job':{width}} {'tokens':>8} {'FLOPs':>8} {'disk GB':>11}"
    head += f" {'memory GB':>10} {'hours':>10}"
    rule = "-" * len(head)
    body = [_line(cost, width, machine) for cost in costs]
    foot = [_line(cost, width, machine) for cost in [*sums, whole]]
    return "\n".join([head, rule, *body, rule, *foot]) + "\n"


def both_ways(stored: Sequence[Cost], streamed: Sequence[Cost]) -> str:
    """What it costs to make the SAEs with stored activations and without, in two lines."""
    ways = (("with harvest.store: true", stored), ("with harvest.store: false", streamed))
    lines = []
    for way, costs in ways:
        whole, longest = _sum("", [*costs]), max(cost.seconds for cost in costs)
        lines.append(
            f"SAEs {way:25} {len(costs):6} jobs, {whole.disk / 1e9:11,.1f} GB of disk, "
            f"{whole.seconds / 3600:9,.2f} hours, the longest {longest / 3600:,.2f}\n"
        )
    return "".join(lines)


def _sum(rule: str, costs: list[Cost]) -> Cost:
    name = f"{len(costs)} job{'s' if len(costs) > 1 else ''}; the memory of the largest"
    return Cost(
        rule,
        name,
        tokens=sum(cost.tokens for cost in costs),
        flops=sum(cost.flops for cost in costs),
        disk=sum(cost.disk for cost in costs),
        memory=max(cost.memory for cost in costs),
        seconds=sum(cost.seconds for cost in costs),
    )


def _line(cost: Cost, width: int, machine: Machine) -> str:
    memory = cost.memory / 1e9
    mark = "!" if memory > machine.memory_gb else " "
    return (
        f"{cost.rule:9} {cost.name:{width}} {cost.tokens:8.1e} {cost.flops:8.1e} "
        f"{cost.disk / 1e9:11,.1f} {memory:9,.1f}{mark} {cost.seconds / 3600:10,.2f}"
    )
