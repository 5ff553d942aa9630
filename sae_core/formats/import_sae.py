"""Convert an SAE directory of SAELens, dictionary_learning or this trainer's predecessor."""

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
class Import:
    """The SAE to import."""

    source: Annotated[Path, tyro.conf.Positional]
    """Directory of SAELens (cfg.json), of dictionary_learning (ae.pt), or with the weights.pt and
    config.json of this trainer's predecessor."""

    output: Annotated[Path, tyro.conf.Positional]
    """SAE directory to write; its name is the SAE's name."""

    model_name: str | None = None
    """Hub id or local directory of the language model; by default as the directory records it."""

    threshold: float | None = None
    """Threshold for a BatchTopK SAE that was stored without one, such as the calibrated threshold
    that its evaluation records."""


def import_(config: Import) -> None:
    """Write the SAE directory, including the files for SAELens."""
    from sae_core.formats.checkpoint import load_history, sae_files, write_files
    from sae_core.formats.foreign import import_sae
    from sae_core.formats.saelens import saelens_files
    from sae_core.utils.naming import SAE_FILES

    sae = import_sae(config.source)
    if config.threshold is not None:
        sae.set_threshold(config.threshold)
    if sae.threshold is None:
        raise SAEError(
            f"--threshold: the SAE in {config.source} was stored without one; evaluate it, and "
            "give the threshold that the evaluation was calibrated to"
        )
    if config.model_name:
        sae.spec.metadata["model_name"] = config.model_name
    history = load_history(config.source) if (config.source / SAE_FILES[2]).is_file() else {}
    write_files(config.output, sae_files(sae, history) | saelens_files(sae))
    spec = sae.spec
    print(
        f"SAE: {config.output}, {spec.sae_type} with {spec.d_sae} features at {spec.site} of "
        f"{spec.metadata.get('model_name', 'an unnamed language model')}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    cli.run(
        import_,
        Import,
        "Convert an SAE of SAELens, dictionary_learning or this trainer's predecessor into an SAE "
        "directory.",
        argv,
    )


if __name__ == "__main__":
    main()
