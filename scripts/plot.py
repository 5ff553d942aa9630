"""Draw one SAE's loss curves and feature densities, from its history and its evaluation."""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from sae_core.reporting import plots
from sae_core.reporting.summary import read_evaluations, read_histories
from sae_core.utils import cli
from sae_core.utils.files import write_file


@dataclass(frozen=True)
class Options:
    """What to read, and where the plots go."""

    evaluation: Path
    """The SAE's evaluation, JSON."""

    history: Path
    """The SAE's `history.json`."""

    loss_curves: Path
    """Where the loss curves go, SVG."""

    density: Path
    """Where the histogram of feature densities goes, SVG."""


def draw(options: Options) -> None:
    """Read both files, then write both plots."""
    [evaluation] = read_evaluations([options.evaluation])
    [history] = read_histories([options.history])
    write_file(options.loss_curves, plots.loss_curves(history, evaluation["run_name"]))
    write_file(options.density, plots.density(evaluation))


if __name__ == "__main__":
    cli.run(draw, Options, __doc__)
