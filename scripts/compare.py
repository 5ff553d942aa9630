"""Two SAEs side by side: which features of one the other has too, in the terminal and as a page."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

import tyro

from sae_core.settings.steps import EvaluationConfig
from sae_core.settings.texts import TextsConfig
from sae_core.train_config import ComputeConfig, LoadConfig
from sae_core.utils import cli
from sae_core.utils.limits import PositiveInt, check_limits


@dataclass(frozen=True)
class Options:
    """The two SAEs, and how they are compared."""

    first: Annotated[str, tyro.conf.Positional]
    """SAE directory, run name, or owner/repository/run_name on the Hub."""

    second: Annotated[str, tyro.conf.Positional]
    """The other one, named in the same way."""

    by: Literal["decoder", "activation"] = "decoder"
    """The cosine of decoder rows, for SAEs of one hook; or the correlation of activations on the
    texts, for any two SAEs of one language model."""

    page: Path | None = None
    """HTML file to write, too."""

    max_windows: PositiveInt = EvaluationConfig.max_windows
    """Windows read for the correlation, at most: of those that the first SAE held out."""

    model_name: str | None = None
    """For the correlation: Hub id or local directory of the language model; by default the Hub id
    that the SAEs record."""

    device: Literal["auto", "cuda", "mps", "cpu"] = ComputeConfig.device
    """Where to compute."""

    texts: TextsConfig = field(default_factory=TextsConfig)

    load: LoadConfig = field(default_factory=LoadConfig)

    def __post_init__(self) -> None:
        check_limits(self)


def compare(options: Options) -> None:
    """Print the shares of features with twins, and write the page."""
    from sae_core.corpus.cache import cached_tokens
    from sae_core.corpus.corpora import read_corpus
    from sae_core.evaluation.comparison import TWIN, by_activation, by_decoder, check_one_model
    from sae_core.evaluation.metrics import held_out_windows
    from sae_core.pretrained import load_pretrained
    from sae_core.reporting.comparison_page import Side, comparison_page
    from sae_core.reporting.known_features import known_features
    from sae_core.steering.loading import load_model_of
    from sae_core.utils.files import write_file
    from sae_core.utils.naming import ensure_writable

    if options.page:
        ensure_writable(options.page.parent, "--page")
    a, b = (load_pretrained(name) for name in (options.first, options.second))
    if options.by == "decoder":
        ways = by_decoder(a, b), by_decoder(b, a)
    else:
        check_one_model(a, b)
        corpus = read_corpus(options.texts)
        specs = {options.first: a.spec, options.second: b.spec}
        model = load_model_of(specs, options.model_name, options.load, options.device)
        a, b = (sae.to(model.device).float() for sae in (a, b))
        file = cached_tokens(corpus, model.tokenizer, options.texts.token_root)
        windows = held_out_windows(a.spec, model.tokenizer, file, options.max_windows)
        ways = by_activation(model, a, b, windows)
    names = [Path(name.partition("@")[0]).name for name in (options.first, options.second)]
    for name, other, found in zip(names, reversed(names), ways, strict=True):
        shares = [f"{found.share(least):.1%} above {least}" for least in TWIN]
        print(f"{name}: of {found.n_compared} features, {', '.join(shares)} in {other}")
    if options.page:
        sides = [
            Side(
                name,
                list(zip(found.feature.tolist(), found.nearness.tolist(), strict=True)),
                known_features(name, page=options.page),
            )
            for name, found in zip(names, ways, strict=True)
        ]
        write_file(options.page, comparison_page(sides, options.by, TWIN))
        print(f"page: {options.page}")


if __name__ == "__main__":
    cli.run(compare, Options, __doc__)
