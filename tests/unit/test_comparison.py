"""Two SAEs side by side: features are matched, by decoder and by activation."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from running import ROOT, run_here
from synthetic import random_sae
from tiny_model import WIDTH
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sae_core.activations.token_windows import TokenWindows
from sae_core.evaluation.comparison import FEWEST_TOKENS, Matches, by_activation, by_decoder
from sae_core.formats.checkpoint import save_sae
from sae_core.models.language_model import Hook, LanguageModel
from sae_core.sae_base import SparseAutoencoder
from sae_core.utils.errors import SAEError

N = 40


def an_sae(seed: int = 0, **changes: object) -> SparseAutoencoder:
    own = {"d_in": WIDTH, "d_sae": N, "hook_layer": 1, "hook_name": "hook_resid_post"}
    return random_sae("batch_topk", torch.float32, seed, **{**own, **changes}).requires_grad_(False)


def shuffled(sae: SparseAutoencoder) -> tuple[SparseAutoencoder, torch.Tensor]:
    """The same SAE with its features in another order; feature i is there number `place[i]`."""
    order = torch.randperm(N, generator=torch.Generator().manual_seed(4))
    other = copy.deepcopy(sae)
    other.W_dec.copy_(sae.W_dec[order])
    other.W_enc.copy_(sae.W_enc[:, order])
    other.b_enc.copy_(sae.b_enc[order])
    return other, order.argsort()


def test_by_decoder_the_same_features_are_found_in_any_order() -> None:
    sae = an_sae()
    other, place = shuffled(sae)
    other.W_dec[place[:4]] *= -1  # four features have no twin
    found = by_decoder(sae, other)
    assert torch.equal(found.feature[4:], place[4:])
    assert found.share(0.9) == pytest.approx((N - 4) / N)
    assert 0.99 < found.nearness[4:].min() and found.nearness[:4].max() < 0.9


def test_other_hooks_have_no_cosine() -> None:
    with pytest.raises(SAEError, match="--by activation"):
        by_decoder(an_sae(), an_sae(hook_layer=2))


def test_by_activation_is_the_correlation_over_tokens(
    language_model: LanguageModel, windows: TokenWindows
) -> None:
    tokens = windows.train(0, torch.arange(6))
    hooks = [Hook(1, "hook_resid_post"), Hook(2, "hook_resid_post")]
    x, y = (language_model.activations(tokens, hooks)[hook].float() for hook in hooks)
    largest = float(y[:, 1:].norm(dim=-1).quantile(0.9))
    excluded = language_model.tokenizer.convert_ids_to_tokens([int(tokens[0, 5])])
    trains = (tokens != tokens[0, 5]) & (y.norm(dim=-1) <= largest)
    trains[:, 0] = False
    x, y = x[trains], y[trains]
    sae = an_sae(metadata={"excluded_tokens": excluded})
    other = an_sae(seed=1, hook_layer=2, metadata={"outlier_norm": largest})
    sae.b_enc[3] = -1e6  # never active
    sae.b_enc[4:20] = -torch.linspace(1, 8, 16)  # some on a few tokens
    found, back = by_activation(language_model, sae, other, tokens)
    both = torch.cat([sae.encode(x), other.encode(y)], 1).double()
    known, active = (both > 0).sum(0).ge(FEWEST_TOKENS).split(N)
    is_rare = (both[:, :N] > 0).any(0) & ~known
    assert not known[3] and is_rare.any() and known.any()
    assert torch.equal(found.nearness.isnan(), ~known) and found.n_compared == known.sum()
    wanted = torch.corrcoef(both.T)[:N, N:].nan_to_num(nan=-1)
    wanted[~known], wanted[:, ~active] = -1, -1
    torch.testing.assert_close(found.nearness[known], wanted.amax(1)[known], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(back.nearness[active], wanted.amax(0)[active], rtol=1e-4, atol=1e-6)


class NewMatrices(TorchDispatchMode):
    """Counts the tensors of a shape that are made while it is active."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape, self.n = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        found = func(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            is_one = isinstance(x, torch.Tensor) and sorted(x.shape) == sorted(self.shape)
            self.n += is_one and x.data_ptr() not in given
        return found


def test_the_correlation_is_in_memory_once(
    language_model: LanguageModel, windows: TokenWindows
) -> None:
    tokens = windows.train(0, torch.arange(3))
    with NewMatrices(N, N + 9) as made:
        by_activation(language_model, an_sae(), an_sae(seed=1, d_sae=N + 9), tokens)
    assert made.n == 1


@pytest.mark.parametrize("changes", [{"hook_layer": 9}, {"d_in": WIDTH + 1}])
def test_an_sae_of_another_model(
    changes: dict[str, int], language_model: LanguageModel, windows: TokenWindows
) -> None:
    tokens = windows.train(0, torch.arange(1))
    with pytest.raises(SAEError, match="give two SAEs of one model"):
        by_activation(language_model, an_sae(), an_sae(**changes), tokens)


def test_the_share_is_of_the_compared_features() -> None:
    found = Matches(torch.zeros(4), torch.tensor([0.8, 0.95, torch.nan, 0.1]))
    assert found.share(0.7) == pytest.approx(2 / 3) and found.n_compared == 3
    assert Matches(torch.zeros(1), torch.tensor([torch.nan])).share(0.7) == 0


@pytest.mark.parametrize(
    ("one", "two", "is_one"),
    [
        ({"model_name": "Some/Model"}, {"model_name": "some/model"}, True),
        ({"model_name": "Some/Model"}, {"model_name": "Other/Model"}, False),
        ({"model_name": "Some/Model"}, {}, True),
        (
            {"model_name": "m", "model_sha256": "a"},
            {"model_name": "n", "model_sha256": "a"},
            True,
        ),
        ({"model_name": "m", "model_sha256": "a"}, {"model_name": "m", "model_sha256": "b"}, False),
    ],
)
def test_saes_of_two_models(one: dict[str, str], two: dict[str, str], is_one: bool) -> None:
    saes = an_sae(metadata=one), an_sae(metadata=two)
    if is_one:
        assert by_decoder(*saes).share(0.9) == 1
    else:
        with pytest.raises(SAEError, match="two language models"):
            by_decoder(*saes)


@pytest.mark.parametrize("by", ["decoder", "activation"])
def test_the_command(by: str, tmp_path: Path, tiny_model: Path, texts: list[str]) -> None:
    sae = an_sae(metadata={"max_text_length": 24, "val_fraction": 0.5})
    save_sae(tmp_path / "one", sae, {})
    save_sae(tmp_path / "two", shuffled(sae)[0], {})
    (tmp_path / "results/features").mkdir(parents=True)
    lines = [json.dumps({"feature": n, "label": f"<{n}>"}) for n in range(N)]
    (tmp_path / "results/features/two.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "results/features/two.html").touch()
    data = tmp_path / "texts.json"
    data.write_text(json.dumps(texts))
    options = ("--by", by, "--page", "page.html", "--model-name", tiny_model, "--device", "cpu")
    texts_of = ("--data-path", data, "--token-root", tmp_path / "tokens")
    printed = run_here(
        ROOT / "scripts/compare.py", "one", "two", *options, *texts_of, cwd=tmp_path
    ).stdout
    assert "one: of " in printed and "two: of " in printed
    page = (tmp_path / "page.html").read_text()
    (tmp_path / "file").touch()
    command = (ROOT / "scripts/compare.py", "no-sae", "two", "--page", "file/page.html")
    refused = run_here(*command, cwd=tmp_path, ok=False).stderr
    assert "--page" in refused, "known before anything is read"
    assert "Pairs: " in page and str(tmp_path) not in page
    assert 'href="results/features/two.html#feature=' in page and "one.html" not in page
    assert re.search(r"&lt;\d+&gt;", page)
    if by == "decoder":
        assert "one: of 40 features, 100.0% above 0.7, 100.0% above 0.9" in printed
