"""Put all SAEs side by side: a table on the terminal, a CSV file, plots and a page."""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from sae_core import cli
from sae_core.data_processing.sources import Sources
from sae_core.errors import SAEError
from sae_core.files import write_file
from sae_core.records import read_json
from sae_core.reporting.page import Making, read_run, report_page
from sae_core.reporting.plots import l0_against_fvu, l0_against_loss_recovered
from sae_core.reporting.provenance import environment, read_jobs
from sae_core.reporting.summary import summary_csv, summary_table


@dataclass(frozen=True)
class Options:
    """What to read, and where the results go."""

    evaluations: tuple[Path, ...]
    """The SAEs' evaluations, JSON."""

    saes: tuple[Path, ...]
    """The same SAEs' directories, in the same order."""

    summary: Path
    """Where the summary goes, CSV."""

    loss_recovered: Path
    """Where the plot of L0 against loss recovered goes, SVG."""

    fvu: Path
    """Where the plot of L0 against FVU goes, SVG."""

    report: Path
    """Where the page goes, HTML."""

    features: tuple[Path, ...] = ()
    """The figures of the same SAEs' features, JSON, in the same order; or none."""

    texts: Path | None = None
    """Processed JSON file that the SAEs were trained on; its sources are read."""

    records: tuple[Path, ...] = ()
    """The models' records."""

    benchmarks: Path | None = None
    """Folder of Snakemake's benchmarks."""

    config: Path | None = None
    """The configuration of the run, YAML."""

    def __post_init__(self) -> None:
        for option in ("saes", "features"):
            given, n = len(getattr(self, option)), len(self.evaluations)
            if given != n and (given or option == "saes"):
                raise SAEError(
                    f"--{option}: {given} for {n} evaluations; give one for each, in the same order"
                )


def summarise(options: Options) -> None:
    """Read everything, then write the files and print the table."""
    features = options.features or (None,) * len(options.evaluations)
    runs = [
        read_run(*paths) for paths in zip(options.evaluations, options.saes, features, strict=True)
    ]
    page = report_page(runs, making(options))
    evaluations = [run.evaluation for run in runs]
    write_file(options.summary, summary_csv(evaluations))
    write_file(options.loss_recovered, l0_against_loss_recovered(evaluations))
    write_file(options.fvu, l0_against_fvu(evaluations))
    write_file(options.report, page)
    print(summary_table(evaluations), end="")


def making(options: Options) -> Making:
    """What the page says about how the SAEs were made."""
    advice = "delete it and fetch again"
    models = [read_json(path, "model record", advice) for path in options.records]
    owners = [*(path.name for path in options.saes), *(path.stem for path in options.records)]
    config = options.config
    return Making(
        environment(),
        options.texts and Sources.load(options.texts),
        read_jobs(options.benchmarks, owners) if options.benchmarks else (),
        models,
        config.read_text(encoding="utf-8") if config and config.is_file() else "",
        str(config) if config else "",
    )


if __name__ == "__main__":
    cli.run(summarise, Options, __doc__)
