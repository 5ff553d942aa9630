"""What the planner knows of machines, models and texts, and what it says of them before a run."""

import json
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from sae_core.corpus import forms
from sae_core.models.model_sources import ModelRecord
from sae_core.utils.errors import SAEError
from sae_core.workflow.workflow_config import ModelPlan, Plan

BYTES_PER_TOKEN = 4.5
"""Of English text, with the tokenizers of SmolLM2 and Qwen3; for a corpus that is not counted."""

MODEL_BYTES = 2
"""A parameter in a model's files, a stored activation: bfloat16 or float16."""

PACKED, PACKING = (*forms.PACKED, ".parquet"), 2.8
"""Files that are compressed, and how much longer their texts are: chapters with zstd, alone or in
Parquet."""

ENOUGH_TOKENS = 1e6
"""Tokens of a corpus for SAEs worth studying: about as many as in the table of
docs/benchmarks.md on quality, where they suffice for 4,608 features of a model of 135 million
parameters. Larger SAEs want more."""


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer with gated MLPs (Llama, Qwen, Gemma, Mistral)."""

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_mlp: int
    vocab_size: int
    tied: bool
    """Whether embedding and unembedding are one matrix."""

    @classmethod
    def read(cls, folder: Path) -> "ModelShape":
        """The shape in the `config.json` of a directory in Hugging Face's format.

        Raises:
            SAEError: it is of another architecture.
        """
        path = folder / "config.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            n_heads = found["num_attention_heads"]
            return cls(
                n_layers=found["num_hidden_layers"],
                d_model=found["hidden_size"],
                n_heads=n_heads,
                n_kv_heads=found.get("num_key_value_heads") or n_heads,
                head_dim=found.get("head_dim") or found["hidden_size"] // n_heads,
                d_mlp=found["intermediate_size"],
                vocab_size=found["vocab_size"],
                tied=found.get("tie_word_embeddings", True),
            )
        except (OSError, ValueError, KeyError) as error:
            raise SAEError(
                f"{path}: the model's shape cannot be read from it ({error}); give it under "
                "`shapes` in the file of --tables"
            ) from error

    @property
    def block(self) -> int:
        """Parameters of a block's matrices."""
        attention = self.d_model * self.head_dim * (2 * self.n_heads + 2 * self.n_kv_heads)
        return attention + 3 * self.d_model * self.d_mlp

    @property
    def unembedding(self) -> int:
        """Parameters that turn an activation into logits."""
        return self.vocab_size * self.d_model

    @property
    def parameters(self) -> int:
        """All of them, norms left out."""
        return self.n_layers * self.block + self.unembedding * (1 if self.tied else 2)

    def up_to(self, layer: int) -> int:
        """Of them, those of a model without the blocks after a layer."""
        return self.parameters - (self.n_layers - layer - 1) * self.block

    def flops(self, blocks: int, length: int, logits: int = 0) -> float:
        """Operations per token through so many blocks, in windows of `length`, and through the
        unembedding so many times."""
        attention = 4 * length * self.n_heads * self.head_dim
        return blocks * (2 * self.block + attention) + logits * 2 * self.unembedding


@dataclass(frozen=True)
class Machine:
    """What a job runs on; rates are reached in practice, not data sheet figures."""

    model_tflops: float
    """Of the language model's passes."""
    sae_tflops: float
    """Of an SAE's dense products."""
    pair_tflops: float
    """Of its work on pairs, which memory limits."""
    bandwidth_gb_s: float
    """Of its memory."""
    step_ms: float
    """Milliseconds of a training step that its size does not change."""
    memory_gb: float
    disk_gb_s: float
    start_seconds: float
    """Until a program with torch and transformers computes."""
    basis: str
    """Where these figures are from."""
    is_cpu: bool = False
    """Whether it is no GPU; here `auto` may mean float32."""


@dataclass(frozen=True)
class Tables:
    """The machines and model shapes of a planning file."""

    machines: dict[str, Machine]
    shapes: dict[str, ModelShape]

    @classmethod
    def load(cls, path: Path) -> "Tables":
        """Read them.

        Raises:
            SAEError: the file is missing, or an entry has too few keys or too many.
        """
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise SAEError(f"--tables {path}: cannot be read ({error})") from error
        return cls(
            _entries(Machine, found.get("machines", {}), f"{path}: machines"),
            _entries(ModelShape, found.get("shapes", {}), f"{path}: shapes"),
        )

    def machine(self, name: str) -> Machine:
        """The machine of that name."""
        if name not in self.machines:
            raise SAEError(f"--machine {name}: the tables have {', '.join(self.machines)}")
        return self.machines[name]

    def shape(self, model: ModelPlan, record: Path) -> ModelShape:
        """A model's shape: of the table, or of its directory if there is one.

        Args:
            record: what `fetch` writes of it.
        """
        if model.name in self.shapes:
            return self.shapes[model.name]
        if model.source.path is not None:
            return ModelShape.read(model.source.path)
        if record.is_file():
            return ModelShape.read(Path(ModelRecord.load(record).path))
        raise SAEError(
            f"{model.name}: neither in the table `shapes` nor fetched; add its shape to the file "
            "of --tables, or fetch it"
        )


def _entries(kind: Any, found: dict[str, Any], where: str) -> dict[str, Any]:
    known = {f.name for f in fields(kind)}
    needed = {f.name for f in fields(kind) if f.default is MISSING}
    for name, entry in found.items():
        if not needed <= set(entry) <= known:
            wrong = sorted((needed - set(entry)) | (set(entry) - known))
            raise SAEError(f"{where}: {name}: missing or unknown: {', '.join(wrong)}")
    return {name: kind(**entry) for name, entry in found.items()}


def corpus_tokens(plan: Plan) -> float:
    """The approximate number of tokens of the existing chapters or files. Of a data set of the Hub
    it is the most that is read, or 0 if there is no such limit."""
    files = [*plan.chapters(), *plan.corpus_files()]
    tokens = sum(map(_text_bytes, files)) / BYTES_PER_TOKEN
    most = plan.corpus.max_tokens if plan.corpus else None
    return min(tokens or most, most) if most else tokens


def _text_bytes(path: Path) -> float:
    return path.stat().st_size * (PACKING if path.suffix.lower() in PACKED else 1)


def downloads(plan: Plan, tables: Tables, records: Path) -> str | None:
    """What has to be downloaded from the Hub; None if all models are here.

    Args:
        records: folder of what `fetch` wrote of the models that are here.
    """
    missing = [
        model.name
        for model in plan.models.values()
        if not (model.source.path or model.source.wheel)
        and not (records / f"{model.model_id}.json").is_file()
    ]
    if not missing:
        return None
    known = {name: tables.shapes[name].parameters for name in missing if name in tables.shapes}
    size = f"{MODEL_BYTES * sum(known.values()) / 1e9:,.1f} GB" if known else "of unknown size"
    if known and len(known) < len(missing):
        size += f" and {len(missing) - len(known)} of unknown size"
    return (
        f"To download from the Hub, unless already cached: {size} ({', '.join(missing)}). "
        "The cost of every job: python scripts/plan.py --help"
    )


def sufficiency(tokens: float) -> str:
    """What a corpus of this many tokens is enough for."""
    if tokens >= ENOUGH_TOKENS:
        return f"A corpus of {tokens:,.0f} tokens."
    megabytes = ENOUGH_TOKENS * BYTES_PER_TOKEN / 1e6
    return (
        f"A corpus of {tokens:,.0f} tokens: enough to try the workflow, but SAEs worth studying "
        f"need {ENOUGH_TOKENS:,.0f} or more ({megabytes:g} MB of text)."
    )
