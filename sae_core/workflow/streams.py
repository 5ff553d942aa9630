"""Which SAEs one job trains together, where activations are not stored.

A job notes for each SAE that it has trained what its settings were and which stream it is from. An
SAE that is there with these settings stays in its stream. The others form new streams, some layers
to each. So an SAE that is added or changed is trained alone, from a stream of its own, and the rest
is left as it is.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sae_core.sae.config import SAEConfig
from sae_core.utils.records import read_record
from sae_core.workflow.workflow_config import ModelPlan, Plan, RunPlan

ID_LENGTH, HASH_LENGTH = 12, 32

MOST_SAES = 500
"""In a job, whose command names each of them: Linux takes 131,071 bytes as one argument."""


@dataclass(frozen=True)
class StreamNote:
    """How an SAE was trained: `results/streams/<model_id>/<run_name>.json`."""

    stream: str
    settings: str
    """Hash of its settings."""


def sae_options(run: RunPlan) -> str:
    """What `scripts/stream.py` is told of one SAE, as JSON."""
    default = asdict(SAEConfig())
    changed = {key: value for key, value in asdict(run.sae).items() if value != default[key]}
    return json.dumps({"name": run.name, "hook": run.hook_spec, "sae": changed})


def settings_sha256(plan: Plan, run: RunPlan) -> str:
    """The hash of everything in a configuration that determines an SAE."""
    settings = [plan.stream_options(run.model), sae_options(run), run.origin_sha256]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:HASH_LENGTH]


def notes(folder: Path) -> dict[str, StreamNote]:
    """What is noted of a model's SAEs, by run name.

    Raises:
        SAEError: a note cannot be read.
    """
    advice = "delete it, and its SAE is trained again"
    return {
        path.stem: read_record(StreamNote, path, "note", advice)
        for path in sorted(folder.glob("*.json"))
    }


def streams(
    plan: Plan,
    model: ModelPlan,
    n_layers: int | None,
    noted: Mapping[str, StreamNote],
    is_there: Callable[[str, str], bool],
) -> dict[str, list[RunPlan]]:
    """The SAEs of a model by the id of the stream that each belongs to.

    Args:
        n_layers: of the model, needed for the layer `middle` only.
        noted: as `notes` gives it.
        is_there: whether the SAE of a run name exists, or a stream still has it.
    """
    found: dict[str, list[RunPlan]] = {}
    new: list[RunPlan] = []
    hashes = {run.name: settings_sha256(plan, run) for run in model.runs(n_layers)}
    for run in model.runs(n_layers):
        note = noted.get(run.name)
        if note and note.settings == hashes[run.name] and is_there(run.name, note.stream):
            found.setdefault(note.stream, []).append(run)
        else:
            new.append(run)
    for together in _new_streams(plan, model, n_layers, new):
        lines = "".join(f"{run.name} {hashes[run.name]}\n" for run in together)
        stream = hashlib.sha256(lines.encode()).hexdigest()[:ID_LENGTH]
        found.setdefault(stream, []).extend(together)
    return found


def _new_streams(
    plan: Plan, model: ModelPlan, n_layers: int | None, runs: Sequence[RunPlan]
) -> Iterator[list[RunPlan]]:
    """SAEs that are trained together: of some layers, and none with one that it begins with."""
    depths = {run.name: _depth(model, run, n_layers) for run in runs}
    layers = list(dict.fromkeys(run.layer for run in runs))
    most = plan.harvest.layers_per_job or len(layers) or 1
    for depth in sorted(set(depths.values())):
        for first in range(0, len(layers), most):
            some = layers[first : first + most]
            together = [run for run in runs if run.layer in some and depths[run.name] == depth]
            for start in range(0, len(together), MOST_SAES):
                yield together[start : start + MOST_SAES]


def _depth(model: ModelPlan, run: RunPlan, n_layers: int | None) -> int:
    """How many SAEs of this configuration come before one that begins with another."""
    depth, origin = 0, model.origin_run(run, n_layers)
    while origin is not None:
        depth += 1
        origin = model.origin_run(model.runs_by_name(n_layers)[origin], n_layers)
    return depth
