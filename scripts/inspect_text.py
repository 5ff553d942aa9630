"""The strongest features of each token of a text, in the terminal and as a page."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

import tyro

from sae_core.train_config import ComputeConfig, LoadConfig
from sae_core.utils import cli
from sae_core.utils.limits import PositiveInt, check_limits


@dataclass(frozen=True)
class Options:
    """What to read."""

    text: Annotated[str, tyro.conf.Positional]
    """A sentence, or a longer text."""

    sae: str
    """SAE directory, run name, or owner/repository/run_name on the Hub."""

    most: PositiveInt = 5
    """Features shown per token."""

    labels: tuple[Path, ...] = ()
    """JSON lines with the features' labels; by default results/features/<run>.jsonl and, of an LLM,
    results/labels/<run>.jsonl, if they are there."""

    page: Path | None = None
    """HTML file to write, too."""

    model_name: str | None = None
    """Hub id or local directory of the language model; by default the Hub id that the SAE records.
    The path of a local directory is never recorded, so give it here."""

    device: Literal["auto", "cuda", "mps", "cpu"] = ComputeConfig.device
    """Where to compute."""

    load: LoadConfig = field(default_factory=LoadConfig)

    def __post_init__(self) -> None:
        check_limits(self)


def inspect(options: Options) -> None:
    """Print a line for each feature of each token, and write the page."""
    from sae_core.reporting.known_features import known_features
    from sae_core.reporting.text_page import text_page, visible
    from sae_core.steering.loading import load_pair
    from sae_core.steering.reading import read_text
    from sae_core.utils.files import write_file
    from sae_core.utils.naming import ensure_writable

    if options.page:
        ensure_writable(options.page.parent, "--page")
    run = Path(options.sae.partition("@")[0]).name
    known = known_features(run, options.labels, options.page)
    sae, model = load_pair(options.sae, options.model_name, options.load, options.device)
    readings = read_text(model, sae, options.text, options.most)
    for token, found, n_active in readings:
        print(f"{visible(token)}  ({n_active} active)")
        for number, value in found:
            print(f"  {number:>6} {value:9.3f}  {known.labels.get(number, '')}".rstrip())
    if options.page:
        write_file(options.page, text_page(run, readings, known))
        print(f"page: {options.page}")


if __name__ == "__main__":
    cli.run(inspect, Options, __doc__)
