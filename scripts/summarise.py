"""Put all SAEs side by side: a table on the terminal, a CSV file, a plot and a page."""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from sae_core import cli
from sae_core.errors import SAEError
from sae_core.files import write_file
from sae_core.reporting.page import report_page
from sae_core.reporting.plots import l0_against_loss_recovered
from sae_core.reporting.summary import (
    read_evaluations,
    read_histories,
    summary_csv,
    summary_table,
)


@dataclass(frozen=True)
class Options:
    """What to read, and where the results go."""

    evaluations: tuple[Path, ...]
    """The SAEs' evaluations, JSON."""

    histories: tuple[Path, ...]
    """The same SAEs' `history.json` files, in the same order."""

    summary: Path
    """Where the summary goes, CSV."""

    pareto: Path
    """Where the plot of L0 against loss recovered goes, SVG."""

    report: Path
    """Where the page goes, HTML."""

    def __post_init__(self) -> None:
        if len(self.evaluations) != len(self.histories):
            raise SAEError(
                f"--histories: {len(self.histories)} for {len(self.evaluations)} evaluations; give "
                "one for each, in the same order"
            )


def summarise(options: Options) -> None:
    """Read everything, then write the three files and print the table."""
    evaluations = read_evaluations(options.evaluations)
    page = report_page(evaluations, read_histories(options.histories))
    write_file(options.summary, summary_csv(evaluations))
    write_file(options.pareto, l0_against_loss_recovered(evaluations))
    write_file(options.report, page)
    print(summary_table(evaluations), end="")


if __name__ == "__main__":
    cli.run(summarise, Options, __doc__)
