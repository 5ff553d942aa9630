"""Train an SAE on a language model, or several from one stream of its activations."""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: import the package from the repository it lies in
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from sae_core.distributed.torchrun import launched
from sae_core.model_training.one_run import train_one, train_several
from sae_core.train_config import RunsConfig
from sae_core.utils import cli
from sae_core.utils.progress import quiet


def train(config: RunsConfig) -> None:
    """Train the SAEs and print their paths."""
    runs = config.runs()
    if launched(config.runtime.gpus):
        return
    with quiet(config.output.quiet):
        done = [train_one(runs[0])] if len(runs) == 1 else train_several(runs)

    from sae_core.trainer.resume import forget_states

    for trained in done:
        forget_states(trained.checkpoints)
        print(f"SAE: {trained.folder}")


def main(argv: Sequence[str] | None = None) -> None:
    about = "Train sparse autoencoders on a language model: one, or several from one stream."
    cli.run(train, RunsConfig, about, argv)


if __name__ == "__main__":
    main()
