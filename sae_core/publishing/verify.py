"""Download what was uploaded and compare every file with what was sent."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if not __package__:  # run as a file: import the package from the repository it lies in
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import tyro

from sae_core.utils import cli
from sae_core.utils.errors import SAEError


@dataclass(frozen=True)
class Uploads:
    """What to verify."""

    markers: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Upload markers: results/uploads/<run_name>.json, or upload.json next to the checkpoints."""


def verify(uploads: Uploads) -> None:
    """Print for each upload whether its files are as sent.

    Raises:
        SAEError: one is not.
    """
    from sae_core.publishing import hub

    spoilt: list[str] = []
    for path in uploads.markers:
        marker = hub.Marker.load(path)
        wrong = hub.verify(marker)
        spoilt += wrong
        state = f"differs in {', '.join(wrong)}" if wrong else f"{len(marker.files)} files as sent"
        print(f"{marker.run_name} in {marker.repo} at {marker.commit[:12]}: {state}", flush=True)
    if spoilt:
        raise SAEError(
            f"{len(spoilt)} files on the Hub differ; delete the markers and upload again"
        )


def main(argv: Sequence[str] | None = None) -> None:
    cli.run(verify, Uploads, "Compare uploaded SAEs with what was sent.", argv)


if __name__ == "__main__":
    main()
