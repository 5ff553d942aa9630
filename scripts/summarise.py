"""Put all SAEs side by side: a table on the terminal, a CSV file, plots and a page."""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from sae_core.corpus.token_manifest import TokenManifest
from sae_core.reporting.page import Making, read_run, report_page
from sae_core.reporting.plots import l0_against_fvu, l0_against_loss_recovered
from sae_core.reporting.provenance import environment, read_jobs
from sae_core.reporting.summary import feature_figures, summary_csv, summary_table
from sae_core.utils import cli
from sae_core.utils.errors import SAEError
from sae_core.utils.files import write_file
from sae_core.utils.records import read_json


@dataclass(frozen=True)
class Options:
    """What to read, and where the results go."""

    runs: Path
    """The SAEs: a file with one run name per line."""

    results: Path
    """The workflow's results: `evaluations`, `saes`, `features`, and if there `benchmarks` and
    `config.yaml`."""

    summary: Path
    """Where the summary goes, CSV."""

    loss_recovered: Path
    """Where the plot of L0 against loss recovered goes, SVG."""

    fvu: Path
    """Where the plot of L0 against FVU goes, SVG."""

    report: Path
    """Where the page goes, HTML."""

    tokens: Path | None = None
    """Folder of the tokenised texts that the SAEs were trained on; it says where they are from."""

    records: tuple[Path, ...] = ()
    """The models' records."""


def summarise(options: Options) -> None:
    """Read everything, then write the files and print the table."""
    names = read_names(options.runs)
    runs = [
        read_run(
            options.results / f"evaluations/{name}.json",
            options.results / f"saes/{name}",
            options.results / f"features/{name}.json",
        )
        for name in names
    ]
    page = report_page(runs, making(options, names))
    evaluations = [run.evaluation | feature_figures(run.features) for run in runs]
    write_file(options.summary, summary_csv(evaluations))
    write_file(options.loss_recovered, l0_against_loss_recovered(evaluations))
    write_file(options.fvu, l0_against_fvu(evaluations))
    write_file(options.report, page)
    print(summary_table(evaluations), end="")


def read_names(path: Path) -> list[str]:
    """The run names in a file."""
    try:
        names = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SAEError(
            f"--runs {path}: cannot be read ({error}); give a text file with one run name per line"
        ) from error
    if not all(names):
        raise SAEError(f"--runs {path}: no run names; give one per line")
    return names


def making(options: Options, names: list[str]) -> Making:
    """What the page says about how the SAEs were made."""
    advice = "delete it and fetch again"
    models = [read_json(path, "model record", advice) for path in options.records]
    owners = [*names, *(path.stem for path in options.records)]
    config = options.results / "config.yaml"
    return Making(
        environment(),
        TokenManifest.load(options.tokens).sources if options.tokens else None,
        read_jobs(options.results / "benchmarks", owners),
        models,
        config.read_text(encoding="utf-8") if config.is_file() else "",
        str(config),
    )


if __name__ == "__main__":
    cli.run(summarise, Options, __doc__)
