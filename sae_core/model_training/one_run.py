"""What both training command lines do for one model: check, train, track, evaluate, publish."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sae_core.model_training.wandb_session import evaluation_summary, is_on, log_in
from sae_core.settings.services import PublishingConfig, TrackingConfig
from sae_core.settings.steps import EvaluationConfig
from sae_core.train_config import RunConfig
from sae_core.utils.errors import SAEError
from sae_core.utils.ranks import is_follower

if TYPE_CHECKING:
    from sae_core.model_training.tracked_run import Plan, TrackedRun
    from sae_core.models.language_model import LanguageModel
    from sae_core.trainer.checked_run import CheckedRun


def check_services(tracking: TrackingConfig, publishing: PublishingConfig) -> TrackingConfig:
    """Check the key and the token of the services that are to be used, before anything runs.

    Returns:
        How W&B can be told; see `log_in`.

    Raises:
        SAEError: one is missing, wrong, or has too few rights.
    """
    login = log_in(tracking)
    if publishing.upload_to_hf and not is_follower():
        from sae_core.publishing.access import check_access

        check_access(publishing)
    return login


class Trained(NamedTuple):
    """Where a run's files are."""

    folder: Path
    """The final SAE directory."""
    checkpoints: Path


def train_one(config: RunConfig, batch: bool = False) -> Trained:
    """Train one SAE, and track and publish it if the settings ask for that.

    Everything that can be wrong with a key, a token or a name is found before the model is
    loaded. A tracked or published SAE is evaluated too; the evaluation lies beside its checkpoints.
    The training's last state stays, so that the same call trains nothing again, until
    `forget_states`. Of several processes that share the training, the first alone comes back.

    Raises:
        SAEError: something is wrong; what was written before is kept.
    """
    login = check_services(config.tracking, config.publishing)

    from sae_core.distributed.process_group import join
    from sae_core.model_training.tracked_run import tracked_run
    from sae_core.trainer.checked_run import check_run
    from sae_core.trainer.streamed import activations_of
    from sae_core.trainer.training_inputs import Settings

    group = join(config.runtime.device)
    run = check_run(config, batch)
    with tracked_run(
        _plan(config, run, login),
        Settings.of(config),
        lambda: activations_of(config, run, group),
        group,
    ) as done:
        _finish(config, run, login, done)
    return Trained(done.folder, run.checkpoints)


def train_several(configs: Sequence[RunConfig]) -> list[Trained]:
    """The same for several SAEs of one model, from one stream of its activations.

    Args:
        configs: they differ in the SAE and its layer alone.

    Raises:
        SAEError: something is wrong, or some SAEs have failed; those of the others are there.
    """
    first = configs[0]
    login = check_services(first.tracking, first.publishing)

    from sae_core.model_training.tracked_run import tracked_runs
    from sae_core.trainer.checked_run import check_runs
    from sae_core.trainer.streamed import activations_of_all
    from sae_core.trainer.training_inputs import Settings

    runs = check_runs(configs)
    pairs = list(zip(configs, runs, strict=True))
    with tracked_runs(
        [_plan(config, run, login) for config, run in pairs],
        [Settings.of(config) for config in configs],
        lambda: activations_of_all(configs, runs),
    ) as all_done:
        for (config, run), done in zip(pairs, all_done, strict=True):
            _finish(config, run, login, done)
    return [Trained(run.output, run.checkpoints) for run in runs]


def _plan(config: RunConfig, run: "CheckedRun", login: TrackingConfig) -> "Plan":
    from sae_core.model_training.tracked_run import Plan

    tags = (config.sae.sae_type, f"layer {run.hook.layer}", config.model.name)
    resolved = _resolved(config, run.hook.layer)
    return Plan(run.name, run.output, run.checkpoints, login, resolved, tags)


def _finish(
    config: RunConfig, run: "CheckedRun", login: TrackingConfig, done: "TrackedRun"
) -> None:
    """Evaluate and publish a trained SAE, if the settings ask for that."""
    from sae_core.models.language_model import LanguageModel

    folder, tracking, evaluation = done.folder, done.tracking, None
    if config.publishing.upload_to_hf or is_on(login):
        model = done.activations.model
        assert isinstance(model, LanguageModel), "they are streamed from it"
        evaluation = _evaluate(config, run, folder, model)
        if evaluation:
            tracking.summarise(**evaluation_summary(json.loads(evaluation.read_text())))
    if config.publishing.upload_to_hf:
        tracking.summarise(**_upload(config, folder, evaluation, run.checkpoints))


def _resolved(config: RunConfig, layer: int) -> dict[str, Any]:
    """The settings of the training in groups, the middle layer as a number, the model by the name
    that others may read."""
    groups = {name: values for name, values in asdict(config).items()}
    groups["hook"]["hook_layer"] = layer
    groups["model"]["model_name"] = config.model.name
    return {k: values for k, values in groups.items() if k not in ("tracking", "publishing")}


def _evaluate(
    config: RunConfig, run: "CheckedRun", folder: Path, model: "LanguageModel"
) -> Path | None:
    """Evaluate the SAE on its held-out windows, if it has enough of them."""
    from sae_core.evaluation.identity import identity
    from sae_core.evaluation.metrics import evaluate, held_out_windows
    from sae_core.formats.checkpoint import load_sae
    from sae_core.utils.files import write_file
    from sae_core.utils.naming import EVALUATION_FILE

    sae = load_sae(folder)
    most = EvaluationConfig().max_windows
    try:
        windows = held_out_windows(sae.spec, model.tokenizer, run.file, most)
    except SAEError as error:
        print(f"not evaluated: {error}", flush=True)
        return None
    figures = evaluate(model, sae, windows, config.runtime.batch_size)
    path = run.checkpoints / EVALUATION_FILE
    write_file(path, json.dumps(identity(folder.name, sae.spec) | figures, indent=1) + "\n")
    print(f"evaluation: {path}", flush=True)
    return path


def _upload(
    config: RunConfig, folder: Path, evaluation: Path | None, beside: Path
) -> dict[str, str]:
    """Upload the SAE; what the run's summary says of it."""
    from sae_core.publishing import hub
    from sae_core.utils import cli
    from sae_core.utils.naming import UPLOAD_MARKER

    path, repo = beside / UPLOAD_MARKER, config.publishing.repo
    try:
        marker = hub.upload(folder, evaluation, repo)
    except SAEError as error:
        given = f"--evaluation {evaluation} " if evaluation else ""
        raise SAEError(
            f"{error}; the SAE is in {folder}: run `python scripts/upload.py --sae {folder} "
            f"{given}--marker {path} {cli.options(repo)}`"
        ) from error
    marker.save(path)
    print(f"uploaded: {marker.url}", flush=True)
    return marker.summary
