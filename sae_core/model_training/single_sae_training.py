"""Train one SAE on one language model."""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: import the package from the repository it lies in
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from sae_core.distributed.torchrun import launched
from sae_core.model_training.one_run import train_one
from sae_core.train_config import RunConfig
from sae_core.utils import cli
from sae_core.utils.progress import quiet


def train(config: RunConfig) -> None:
    """Train the SAE and print its path."""
    if launched(config.runtime.gpus):
        return
    with quiet(config.output.quiet):
        done = train_one(config)

    from sae_core.trainer.resume import forget_states

    forget_states(done.checkpoints)
    print(f"SAE: {done.folder}")


def main(argv: Sequence[str] | None = None) -> None:
    cli.run(train, RunConfig, "Train one sparse autoencoder on one language model.", argv)


if __name__ == "__main__":
    main()
