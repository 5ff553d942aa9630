"""The features of one SAE -> labels by a language model, with scores, as JSON lines."""

import asyncio
import sys
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from sae_core.labelling.config import AskingConfig, LabellerConfig, check_asking
from sae_core.labelling.estimate import estimate
from sae_core.labelling.label_files import in_words, write_labels, write_table
from sae_core.labelling.labeller import Labeller
from sae_core.labelling.ledger import Ledger
from sae_core.labelling.windows import Pool, read_entries
from sae_core.utils import cli
from sae_core.utils.errors import SAEError
from sae_core.utils.progress import progress_bar
from sae_core.utils.run_lock import lock

if TYPE_CHECKING:
    from sae_core.labelling.chat import Chat


@dataclass(frozen=True)
class Job:
    """The features to label."""

    entries: Path
    """JSON lines: the features, with their windows."""
    labels: Path
    """JSON lines to write: the labels and their scores."""
    table: Path
    """CSV file to write: the same."""
    answers: Path
    """JSON lines that keep every answer, so that nothing is asked twice: only appended to."""
    dry_run: bool = False
    """Print how many requests and tokens it would take, and what they would cost; ask nothing."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where a local model computes; `auto` takes CUDA, then Apple's MPS, then the CPU."""
    labeller: LabellerConfig = field(default_factory=LabellerConfig)
    asking: AskingConfig = field(default_factory=AskingConfig)


def run(job: Job) -> None:
    from sae_core.labelling.asking import Asker

    pool = Pool(read_entries(job.entries), job.labeller.label_seed)
    if not pool.n_features:
        raise SAEError(f"{job.entries}: no features; analyse the SAE's features again")
    wanted = job.labeller.labelled_features or pool.n_features
    entries = islice(read_entries(job.entries), wanted)
    materials = map(pool.material, entries)  # one at a time: all of them take too much memory
    if job.dry_run:
        ledger = Ledger(job.answers, job.labeller)
        print(estimate(materials, job.labeller, ledger).in_words(job.labeller, job.asking))
        return
    check_asking(job.labeller, job.asking)
    with (
        lock(job.answers.with_suffix(".lock"), "labels these features"),
        progress_bar("labels", "feature", min(wanted, pool.n_features)) as bar,
    ):
        ledger = Ledger(job.answers, job.labeller)
        asker = Asker(language_model(job), ledger, job.asking.request_tries)
        print(asker.chat.where, flush=True)
        labeller = Labeller(asker, job.labeller)
        labels = asyncio.run(labeller.run(materials, job.asking.requests_at_once, bar.update))
    write_labels(job.labels, labels)
    write_table(job.table, labels)
    print(in_words(labels))
    print(
        f"{asker.n_sent} requests sent; {ledger.tokens_in:,} tokens of requests and "
        f"{ledger.tokens_out:,} of answers, with those answered before"
    )
    if asker.n_cut_off:
        print(f"{asker.n_cut_off} answers were cut off: --answer-tokens is too low for this model")
    if any(label.status == "not asked" for label in labels):
        print("the ceiling on tokens was reached: raise --most-tokens, and run it again")


def language_model(job: Job) -> "Chat":
    """The language model that is asked."""
    if job.labeller.labeller_backend == "endpoint":
        from sae_core.labelling.endpoint import Endpoint

        return Endpoint(job.labeller, job.asking)
    from sae_core.labelling.local_model import LocalModel
    from sae_core.utils.devices import pick_device

    return LocalModel(job.labeller, pick_device(job.device))


if __name__ == "__main__":
    cli.run(run, Job, __doc__)
