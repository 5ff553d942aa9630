"""A training, or several together, as every command line runs it: locked, tracked, and exported."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from sae_core.activations.shared_stream import SharedStream
from sae_core.distributed.process_group import ProcessGroup
from sae_core.lockstep import Training, train_together
from sae_core.model_training.wandb_utils import WandbRun
from sae_core.sae_train import train_sae
from sae_core.settings.services import TrackingConfig
from sae_core.trainer.console import Console
from sae_core.trainer.observers import Observers
from sae_core.trainer.training_inputs import Activations, Settings, resolved_training
from sae_core.utils.progress import progress_bar
from sae_core.utils.run_lock import run_lock


class Plan(NamedTuple):
    """Where a training's files go, and what W&B is told about it."""

    name: str
    output: Path
    """The SAE directory to write."""
    checkpoints: Path
    login: TrackingConfig
    """See `wandb_session.log_in`."""
    resolved: dict[str, Any]
    """All settings, in groups; `auto` in those of the training is replaced later."""
    tags: tuple[str, ...]

    @classmethod
    def of_job(
        cls,
        output: Path,
        checkpoints: Path,
        login: TrackingConfig,
        settings: Settings,
        activations: Activations,
    ) -> "Plan":
        """Of a job of the workflow, whose SAE has the name of its directory."""
        hook, target = activations.hook, activations.target
        model = activations.provenance
        hooks = {"hook_spec": hook.spec, "target_hook_name": target.hook_name if target else ""}
        origin = {"model": model.as_metadata(), "hook": hooks}
        tags = (settings.sae.sae_type, f"layer {hook.layer}", model.model_name)
        return cls(output.name, output, checkpoints, login, asdict(settings) | origin, tags)


class TrackedRun(NamedTuple):
    """A training that is done, while its lock and its W&B run are still open."""

    folder: Path
    """The final SAE directory."""
    activations: Activations
    tracking: WandbRun


@contextmanager
def tracked_run(
    plan: Plan,
    settings: Settings,
    make_activations: Callable[[], Activations],
    group: ProcessGroup,
) -> Iterator[TrackedRun]:
    """Train an SAE under the lock of its checkpoints, and tell the terminal and W&B.

    What the caller does inside the context belongs to the same run. Of several processes, the first
    alone gets there.

    Raises:
        SAEError: another process is training this SAE, or the training fails.
    """
    with (
        run_lock(plan.checkpoints),
        _tracking(plan) as tracking,
    ):
        observer = Observers(Console(settings.runtime.log_freq), tracking)
        activations = make_activations()
        tracking.configure(training=asdict(resolved_training(activations, settings)))
        folder = train_sae(activations, settings, plan.output, plan.checkpoints, observer, group)
        tracking.exported(folder)
        yield TrackedRun(folder, activations, tracking)


@contextmanager
def tracked_runs(
    plans: Sequence[Plan],
    settings: Sequence[Settings],
    make_activations: Callable[[], tuple[SharedStream, list[Activations]]],
) -> Iterator[list[TrackedRun]]:
    """The same for several SAEs from one stream, in this process alone.

    Raises:
        SAEError: another process is training one of them, or some fail.
    """
    with ExitStack() as stack:
        for plan in plans:
            stack.enter_context(run_lock(plan.checkpoints))
        trackings = [stack.enter_context(_tracking(plan)) for plan in plans]
        stream, activations = make_activations()
        for tracking, own, how in zip(trackings, activations, settings, strict=True):
            tracking.configure(training=asdict(resolved_training(own, how)))
        trainings = [
            Training(
                plan.name,
                own,
                how,
                plan.output,
                plan.checkpoints,
                Observers(Console(how.runtime.log_freq, plan.name), tracking),
            )
            for plan, own, how, tracking in zip(
                plans, activations, settings, trackings, strict=True
            )
        ]
        with progress_bar(f"{len(plans)} SAEs", "step") as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            train_together(trainings, stream, progress)
        for plan, tracking in zip(plans, trackings, strict=True):
            tracking.exported(plan.output)
        yield [
            TrackedRun(plan.output, own, tracking)
            for plan, own, tracking in zip(plans, activations, trackings, strict=True)
        ]


def _tracking(plan: Plan) -> WandbRun:
    return WandbRun(plan.login, plan.name, plan.checkpoints, plan.resolved, plan.tags)
