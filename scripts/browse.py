"""The analysis of one SAE's features -> a web page."""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from sae_core.reporting.feature_page import feature_page, read_corpus, read_entries
from sae_core.utils import cli
from sae_core.utils.files import write_file


@dataclass(frozen=True)
class Options:
    """What to read, and where the page goes."""

    entries: Path
    """JSON lines: the features to show, with their windows."""

    corpus: Path
    """JSON file: figures of all features together."""

    page: Path
    """Where the page goes, HTML."""

    report: str = "../report.html"
    """Where the page about all SAEs is, relative to this one."""


def browse(options: Options) -> None:
    """Read both files, then write the page."""
    entries, corpus = read_entries(options.entries), read_corpus(options.corpus)
    write_file(options.page, feature_page(entries, corpus, options.report))
    print(f"{len(entries)} features: {options.page}")


if __name__ == "__main__":
    cli.run(browse, Options, __doc__)
