"""The analysis of one SAE's features -> a folder that a Neuronpedia of one's own imports."""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from sae_core.labelling.label_files import read_labels
from sae_core.reporting.feature_data import of_figures
from sae_core.reporting.neuronpedia import CORPUS_KEYS, Export, NeuronpediaConfig, write_export
from sae_core.reporting.summary import read_object
from sae_core.utils import cli
from sae_core.utils.records import read_json_lines


@dataclass(frozen=True)
class Options:
    """What to read, and where the folder goes."""

    entries: Path
    """JSON lines: every active feature, with its windows."""

    corpus: Path
    """JSON file: figures of all features together."""

    record: Path
    """The language model's record."""

    output: Path
    """Where the folder goes: <output>/<model>/<source>."""

    neuronpedia: NeuronpediaConfig

    labels: Path | None = None
    """JSON lines: what an LLM says of the features."""


def export(options: Options) -> None:
    """Read the files, and write the folder."""
    corpus = read_object(options.corpus, "analysis of features", CORPUS_KEYS)
    record = read_object(options.record, "model record", ("n_layers", "d_model"))
    labels = read_labels(options.labels) if options.labels else {}
    made = Export(corpus, record, labels, options.neuronpedia)
    lines = read_json_lines(options.entries)
    entries = of_figures(lines, options.entries, corpus, options.corpus)
    print(write_export(options.output, entries, made))


if __name__ == "__main__":
    cli.run(export, Options, __doc__)
