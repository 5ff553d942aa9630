"""Estimate the cost of every job of a configuration: tokens, FLOPs, disk, memory, hours.

Nothing runs and nothing is fetched. planning.py describes how the figures are computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sae_core.utils import cli
from sae_core.utils.code_hash import ROOT
from sae_core.utils.errors import SAEError
from sae_core.utils.limits import PositiveFloat, check_limits
from sae_core.workflow.config_files import read_file
from sae_core.workflow.costs import both_ways, light, table
from sae_core.workflow.plan_tables import Tables, corpus_tokens, sufficiency
from sae_core.workflow.planning import Planner, tokenising
from sae_core.workflow.workflow_config import load_plan


@dataclass(frozen=True)
class Options:
    """What to plan."""

    config: Path
    """The workflow's configuration."""

    machine: str = "cpu"
    """The machine that each job runs on, one of those in the tables file."""

    corpus_tokens: PositiveFloat | None = None
    """Tokens of the corpus; by default estimated from the chapters or files."""

    tables: Path = ROOT / "config/planning.yaml"
    """File with machines, and with the shapes of models that have not been fetched."""

    results: Path = Path("results")
    """Where records of fetched models are."""

    def __post_init__(self) -> None:
        check_limits(self)


def plan(options: Options) -> None:
    """Print the table."""
    resolved = load_plan(read_file(options.config), ROOT / "workflow/schemas/config.schema.yaml")
    tables = Tables.load(options.tables)
    machine = tables.machine(options.machine)
    tokens = options.corpus_tokens or corpus_tokens(resolved)
    if not tokens > 0:
        raise SAEError(
            f"--config {options.config}: its texts are not here; run this in the folder that "
            "chapters.folders or corpus.data_path are relative to, or give --corpus-tokens"
        )
    costs = [light("process", "chapters")] if resolved.process else []
    costs.append(tokenising(machine, tokens))
    stored, streamed = [], []
    for model in resolved.models.values():
        shape = tables.shape(model, options.results / f"models/{model.model_id}.json")
        planner = Planner(resolved, model, shape, machine, tokens)
        costs += planner.costs()
        with_store, without = planner.ways()
        stored += with_store
        streamed += without
    costs.append(light("summarise", "all SAEs"))
    print(table(costs, machine) + both_ways(stored, streamed), end="")
    print(f"{options.machine}: {machine.basis}. {sufficiency(tokens)}")


def main(argv: Sequence[str] | None = None) -> None:
    cli.run(plan, Options, "Estimate the cost of every job of a configuration.", argv)
