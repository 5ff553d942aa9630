"""A prompt, continued by a language model without steering and with features of an SAE added."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

import tyro

from sae_core.train_config import ComputeConfig, LoadConfig
from sae_core.utils import cli
from sae_core.utils.limits import Filled, NaturalFloat, NaturalInt, PositiveInt, check_limits


@dataclass(frozen=True)
class Options:
    """What to steer, and how."""

    prompt: Annotated[str, tyro.conf.Positional]
    """The text to continue."""

    sae: str
    """SAE directory, run name, or owner/repository/run_name on the Hub."""

    features: Annotated[tuple[NaturalInt, ...], Filled()]
    """Features to add, by their numbers."""

    strengths: tuple[float, ...] = (5.0, 10.0, 20.0)
    """How much of them is added to the activation of every token but the first, in the units of
    their own activations; one continuation for each. Negative ones push the other way."""

    n_tokens: PositiveInt = 40
    """Tokens of a continuation."""

    temperature: NaturalFloat = 0.7
    """How freely tokens are drawn; 0 takes the most likely one."""

    seed: NaturalInt = 0
    """The same seed gives the same continuations."""

    model_name: str | None = None
    """Hub id or local directory of the language model; by default the Hub id that the SAE records.
    The path of a local directory is never recorded, so give it here."""

    device: Literal["auto", "cuda", "mps", "cpu"] = ComputeConfig.device
    """Where to compute."""

    load: LoadConfig = field(default_factory=LoadConfig)

    def __post_init__(self) -> None:
        check_limits(self)


def steer(options: Options) -> None:
    """Print the continuations, one paragraph for each strength."""
    from sae_core.steering.continuation import Sampling, steered_continuations
    from sae_core.steering.loading import load_pair

    sae, model = load_pair(options.sae, options.model_name, options.load, options.device)
    sampling = Sampling(options.n_tokens, options.temperature, options.seed)
    written = steered_continuations(
        sae, model, options.prompt, options.features, options.strengths, sampling
    )
    for strength, text in written:
        print(f"== strength {strength:g}\n{options.prompt}|{text}\n", flush=True)


if __name__ == "__main__":
    cli.run(steer, Options, __doc__)
