"""Turn an SAE directory of SAELens or dictionary_learning into one of ours."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if not __package__:  # run as a file: import the package from the repository it lies in
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import tyro

from sae_core import cli


@dataclass(frozen=True)
class Import:
    """The SAE to import."""

    source: Annotated[Path, tyro.conf.Positional]
    """Directory of SAELens (cfg.json) or of dictionary_learning (ae.pt)."""

    output: Annotated[Path, tyro.conf.Positional]
    """SAE directory to write; its name is the SAE's name."""

    model_name: str | None = None
    """Hub id or local directory of the language model; by default as the directory records it."""


def import_(config: Import) -> None:
    """Write the SAE directory, SAELens's files among the others."""
    from sae_core.checkpoint import sae_files, write_files
    from sae_core.publishing.foreign import import_sae
    from sae_core.publishing.saelens import saelens_files

    sae = import_sae(config.source)
    if config.model_name:
        sae.spec.metadata["model_name"] = config.model_name
    write_files(config.output, sae_files(sae, {}) | saelens_files(sae))
    spec = sae.spec
    print(
        f"SAE: {config.output}, {spec.sae_type} with {spec.d_sae} features at {spec.hook_spec} of "
        f"{spec.metadata['model_name']}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    cli.run(
        import_, Import, "Turn an SAE of SAELens or dictionary_learning into one of ours.", argv
    )


if __name__ == "__main__":
    main()
