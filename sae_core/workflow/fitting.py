"""Which SAEs fit on which GPU: the planner's memory of the Qwen3 family's jobs, as a table.

`make docs` writes it into docs/cluster.md.
"""

import re
from collections.abc import Iterator

from sae_core.utils.code_hash import ROOT
from sae_core.workflow.plan_tables import Tables
from sae_core.workflow.planning import Planner
from sae_core.workflow.workflow_config import Plan, load_plan

BLOCK = re.compile(
    r"(?<=<!-- made by make docs: what fits -->).*?(?=<!-- end -->)", flags=re.DOTALL
)

EXPANSIONS = (4, 8, 16)

TOKENS = 1e6
"""Of the corpus. Memory depends on it only where it is shorter than what is shuffled together."""

MARGIN = 1.05
"""What a GPU has to have more than a job needs: memory comes in pieces."""

MACHINE = "h100"
"""Any GPU: memory is the same on all."""


def fitting_table(tables: Tables, sizes: tuple[float, ...] = (24, 48, 80, 141)) -> str:
    """Memory in GB of each job that runs on a GPU, for every model and expansion, and the smallest
    of GPUs of some `sizes` in GB that fits all of them."""
    head = ["model", "expansion", "harvest", "training", "evaluation", "features", "fits on"]
    lines = [" | ".join(head), "|".join("---" if i in (0, 6) else "--:" for i in range(len(head)))]
    for model in (name for name in tables.shapes if name.startswith("Qwen/Qwen3-")):
        for expansion in EXPANSIONS:
            needed = list(memory(tables, model, expansion))
            largest = max(needed)
            fits = next(
                (f"{size:g} GB" for size in sizes if size >= MARGIN * largest), "none of them"
            )
            figures = [f"{gigabytes:.1f}" for gigabytes in needed]
            lines.append(" | ".join([model, str(expansion), *figures, fits]))
    return "".join(f"|{line}|\n" if "--" in line[:4] else f"| {line} |\n" for line in lines)


def with_table(text: str) -> str:
    """A page with its table made anew."""
    table = fitting_table(Tables.load(ROOT / "config/planning.yaml"))
    return BLOCK.sub(lambda _: f"\n\n{table}\n", text)


def memory(tables: Tables, model: str, expansion: int) -> Iterator[float]:
    """GB of the harvest, the training, the evaluation and the analysis of features of an SAE in the
    middle layer."""
    shape, plan = tables.shapes[model], _plan(model, expansion)
    [of_model] = plan.models.values()
    planner = Planner(plan, of_model, shape, tables.machine(MACHINE), TOKENS)
    [run] = of_model.runs(shape.n_layers)
    harvest = next(planner.harvests())
    for cost in (harvest, planner.training(run), planner.evaluation(run), planner.features(run)):
        yield cost.memory / 1e9


def _plan(model: str, expansion: int) -> Plan:
    """One SAE with the settings of the shipped configuration."""
    config = {
        "chapters": {"folders": {"texts": "texts"}},
        "sae": {"topk": 128, "sae_expansion": expansion},
        "runtime": {"batch_size": "auto"},
        "models": [{"name": model, "layers": "middle"}],
    }
    return load_plan(config, ROOT / "workflow/schemas/config.schema.yaml")
