"""The analysis of one SAE's features -> a web page, and a folder of its data beside it."""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from sae_core.reporting.feature_page import write_page
from sae_core.utils import cli


@dataclass(frozen=True)
class Options:
    """What to read, and where the page goes."""

    entries: Path
    """JSON lines: every active feature, with its windows."""

    corpus: Path
    """JSON file: figures of all features together."""

    page: Path
    """Where the page goes, HTML. The folder of its data has the same name, with `.files` in place
    of `.html`."""

    labels: Path | None = None
    """JSON lines: what an LLM says of the features."""

    report: str = "../report.html"
    """Where the page about all SAEs is, relative to this one."""


def browse(options: Options) -> None:
    """Read the files, then write the page and its data."""
    n = write_page(options.page, options.entries, options.corpus, options.report, options.labels)
    print(f"{n} features: {options.page}")


if __name__ == "__main__":
    cli.run(browse, Options, __doc__)
