"""The features of an SAE in the form that Neuronpedia imports, from the files of their analysis.

Neuronpedia's exports (docs.neuronpedia.org/api-and-data/exports), which its admin panel imports,
have a folder `<model>/<source>` for each SAE. In it `model.jsonl`, `release.jsonl`,
`sourceset.jsonl` and `source.jsonl` have one line each; `features`, `activations` and
`explanations` have files `batch-<n>.jsonl.gz`. A line is a row of a table of its database, and a
column that is left out gets its default. No column takes the scores of a label, which go into its
notes, or a logarithmic axis: a histogram's bins are given by their middles.

Bytes in memory: those of `BATCH` features with their windows.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from sae_core.labelling.labels import Label
from sae_core.reporting.feature_data import SCORES, Entry, chunks
from sae_core.utils.files import new_folder, writing
from sae_core.utils.limits import Pattern, Text, check_limits
from sae_core.utils.naming import REPO_ID

BATCH = 1024
"""Features in a file, as in Neuronpedia's own exports."""

FIRST_USER = "clkht01d40000jv08hvalcvly"
"""The user that a Neuronpedia of one's own begins with."""

CORPUS_KEYS = (
    "run_name", "model_name", "hook_spec", "sae_type", "d_sae", "n_windows", "window_length",
    "n_tokens", "active", "l0",
)  # fmt: skip

Row = dict[str, Any]
Corpus = Mapping[str, Any]
Slug = Annotated[str, Pattern("[A-Za-z0-9_-]+", "letters, digits, - and _")]


@dataclass(frozen=True)
class NeuronpediaConfig:
    """What Neuronpedia is told about an SAE."""

    creator: Text
    """Who made the SAE."""

    neuronpedia_model: Slug | None = None
    """Neuronpedia's id of the language model, such as qwen3-4b; by default made of its name."""

    neuronpedia_set: Slug | None = None
    """Name of the set of SAEs, one for each layer, that the SAE belongs to; by default made of its
    hook and kind."""

    creator_id: Text = FIRST_USER
    """The user of Neuronpedia that the data belongs to."""

    hf_repo_id: Annotated[str, Pattern(REPO_ID.pattern, "owner/name")] | None = None
    """Repository of the Hugging Face Hub that has the SAE in a folder of its run name."""

    def __post_init__(self) -> None:
        check_limits(self)


class Export:
    """The rows of one SAE's tables.

    Args:
        corpus: the figures of all features together, `<run>.json`.
        record: of the language model, `results/models/<model>.json`.
        labels: what an LLM says of features.
    """

    def __init__(
        self,
        corpus: Corpus,
        record: Mapping[str, Any],
        labels: Mapping[int, Label],
        config: NeuronpediaConfig,
    ) -> None:
        self.corpus, self.record, self.labels, self.config = corpus, record, labels, config
        layer = corpus["hook_spec"].split(".")[1]
        own = corpus["run_name"].rpartition(f".blocks.{layer}.")[2]
        self.model = config.neuronpedia_model or slug(corpus["model_name"].split("/")[-1]).lower()
        self.set = config.neuronpedia_set or slug(own)
        self.source = f"{layer}-{self.set}"
        self.owned = {"creatorId": config.creator_id, "visibility": "PUBLIC"}

    def tables(self) -> dict[str, Row]:
        """The rows about the SAE as a whole, by file."""
        corpus, config = self.corpus, self.config
        made_by = {"creatorName": config.creator, "urls": []} | self.owned
        name, release = corpus["run_name"], f"{self.model}-{self.set}"
        source = {
            "id": self.source,
            "modelId": self.model,
            "setName": self.set,
            "num_prompts": corpus["n_windows"],
            "num_tokens_in_prompt": corpus["window_length"],
            "notes": f"{name}: {corpus['sae_type']}, {corpus['d_sae']} features",
        }
        if config.hf_repo_id:
            source |= {"hfRepoId": config.hf_repo_id, "hfFolderId": name}
        return {
            "model": {
                "id": self.model,
                "displayName": corpus["model_name"],
                "displayNameShort": self.model,
                "layers": self.record["n_layers"],
                "dimension": self.record["d_model"],
                "neuronsPerLayer": 0,  # of the model's own neurons there are no pages
                "owner": corpus["model_name"].rpartition("/")[0] or "unknown",
            }
            | self.owned,
            "release": {"name": release, "description": release} | made_by,
            "sourceset": {
                "modelId": self.model,
                "name": self.set,
                "description": self.set,
                "releaseName": release,
            }
            | made_by,
            "source": source | self.owned,
        }

    def feature(self, entry: Entry) -> Row:
        """The row of a feature."""
        edges, counts = entry["histogram"]["log2_edges"], entry["histogram"]["counts"]
        pairs = zip(edges, edges[1:], strict=False)
        return self._of(entry) | {
            "sourceSetName": self.set,
            "creatorId": self.config.creator_id,
            "hookName": self.corpus["hook_spec"],
            "maxActApprox": entry["max"],
            "frac_nonzero": entry["density"],
            "pos_str": [token for token, _ in entry["promoted"]],
            "pos_values": [value for _, value in entry["promoted"]],
            "neg_str": [token for token, _ in entry["suppressed"]],
            "neg_values": [value for _, value in entry["suppressed"]],
            "freq_hist_data_bar_heights": counts,
            "freq_hist_data_bar_values": [round(2 ** ((a + b) / 2), 4) for a, b in pairs],
            "topkCosSimIndices": [other for other, _ in entry["neighbours"]],
            "topkCosSimValues": [cosine for _, cosine in entry["neighbours"]],
        }

    def activations(self, entry: Entry) -> Iterator[Row]:
        """A row for each window of a feature."""
        for number, window in enumerate((*entry["top"], *entry["quantiles"])):
            values = window["activations"]
            yield self._of(entry) | {
                "id": self._id(entry, number),
                "creatorId": self.config.creator_id,
                "tokens": window["tokens"],
                "values": values,
                "maxValue": values[window["peak"]],
                "maxValueTokenIndex": window["peak"],
                "minValue": min(values),
                "dataIndex": str(window["text"]),
                "dataSource": window["chapter"],
            }

    def explanation(self, entry: Entry) -> Row:
        """The row of a feature's label: an LLM's if it gave one, else the default one."""
        said = self.labels.get(entry["feature"])
        label, notes = entry["label"], "found without a language model"
        if said and said.label:
            found = {name: getattr(said, name) for name in SCORES}
            scores = [f"{name} {score:.2f}" for name, score in found.items() if score is not None]
            label, notes = said.label, ", ".join(["by a language model", *scores])
        return self._of(entry) | {
            "id": self._id(entry, "label"),
            "authorId": self.config.creator_id,
            "description": label,
            "notes": notes,
        }

    def _of(self, entry: Entry) -> Row:
        return {"modelId": self.model, "layer": self.source, "index": str(entry["feature"])}

    def _id(self, entry: Entry, *parts: Any) -> str:
        """An id that the same row always has."""
        text = json.dumps([self.model, self.source, entry["feature"], *parts])
        return f"c{hashlib.sha256(text.encode()).hexdigest()[:24]}"


def slug(name: str) -> str:
    """A name with what Neuronpedia takes in an id."""
    return re.sub("[^A-Za-z0-9_-]+", "-", name)


def write_export(folder: Path, entries: Iterable[Entry], export: Export) -> Path:
    """Write an SAE's folder below `folder`, and return it.

    Args:
        entries: every active feature, in any order.

    Raises:
        SAEError: it cannot be written.
    """
    target, n_bytes = folder / export.model / export.source, 0
    with writing(target, lambda: n_bytes), new_folder(target) as new:
        for name, row in export.tables().items():
            (new / f"{name}.jsonl").write_bytes(_lines([row]))
        for name in ("features", "activations", "explanations"):
            (new / name).mkdir()
        for number, batch in enumerate(chunks(entries, BATCH)):
            rows = {
                "features": map(export.feature, batch),
                "activations": (row for entry in batch for row in export.activations(entry)),
                "explanations": map(export.explanation, batch),
            }
            for name, of in rows.items():
                content = gzip.compress(_lines(of), mtime=0)  # the same bytes at any time
                n_bytes += len(content)
                (new / name / f"batch-{number}.jsonl.gz").write_bytes(content)
    return target


def _lines(rows: Iterable[Row]) -> bytes:
    return b"".join(json.dumps(row, allow_nan=False).encode() + b"\n" for row in rows)
