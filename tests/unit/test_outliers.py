"""Outliers, such as attention sinks: an SAE leaves them as they are, alone and in its model."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from older import write_older_sae
from synthetic import KINDS, closed_form, normal, random_sae
from tiny_model import WIDTH
from torch import Tensor

from sae_core import load_pretrained
from sae_core.activations.token_windows import TokenWindows
from sae_core.evaluation.metrics import evaluate
from sae_core.formats.checkpoint import save_sae, write_files
from sae_core.formats.foreign import import_sae
from sae_core.formats.saelens import saelens_files
from sae_core.models.language_model import Hook, LanguageModel
from sae_core.sae_base import SparseAutoencoder
from sae_core.steering.reading import read_text
from sae_core.train_config import ModelConfig
from sae_core.utils.errors import SAEError

HOOK, OUTPUT = Hook(1, "hook_resid_post"), Hook(1, "hook_mlp_out")
NORM = 2.5
"""Between the norms of about half of the activations of `X` and those of the others."""

X = normal(3, 20, 6)


def with_norm(norm: float | None, kind: str = "batch_topk", **changes: Any) -> SparseAutoencoder:
    """A small SAE that records a norm, or none."""
    metadata = {} if norm is None else {"outlier_norm": norm}
    return random_sae(kind, metadata=metadata, **changes).requires_grad_(False)


# Alone


@pytest.mark.parametrize("kind", KINDS)
def test_an_outlier_is_returned_as_it_is(kind: str) -> None:
    sae = with_norm(NORM, kind)
    long = X.pow(2).sum(-1).sqrt() > NORM
    assert 0.2 < long.double().mean() < 0.8
    assert torch.equal(sae.is_outlier(X), long)
    features = closed_form(sae, X)
    torch.testing.assert_close(sae.encode(X), features)  # by the same formula, outlier or not
    x_hat = torch.einsum("blf,fd->bld", features, sae.W_dec) + sae.b_dec
    torch.testing.assert_close(sae(X), torch.where(long[..., None], X, x_hat))
    assert torch.equal(sae(X)[long], X[long])
    for other in (with_norm(None, kind), sae):
        other.keeps_outliers = other is not sae
        torch.testing.assert_close(other(X), x_hat)


def test_a_transcoder_has_nothing_to_return() -> None:
    """It gives another activation than the one that it gets; an outlier is one at either place."""
    sae = with_norm(NORM, target_hook_name="hook_mlp_out")
    torch.testing.assert_close(sae(X), sae.decode(sae.encode(X)))
    y = normal(3, 20, 6, seed=2)
    assert torch.equal(sae.is_outlier(X, y), X.norm(dim=-1) > NORM)
    sae.spec.metadata["target_outlier_norm"] = 3.0
    assert torch.equal(sae.is_outlier(X, y), (X.norm(dim=-1) > NORM) | (y.norm(dim=-1) > 3.0))


# In a directory


def test_directories_with_and_without_a_norm(tmp_path: Path) -> None:
    """`config.json` has the norm since SAEs are trained without outliers; the first have none."""
    x = X.float()
    sae = with_norm(NORM, dtype=torch.float32)
    save_sae(tmp_path / "sae", sae, {})
    found = load_pretrained(str(tmp_path / "sae"))
    assert torch.equal(found(x), sae(x))
    assert not torch.equal(found(x), found.decode(found.encode(x)))
    write_older_sae(tmp_path / "old", "standard")
    older = load_pretrained(str(tmp_path / "old"))
    wide = normal(20, older.spec.d_in, dtype=torch.float32) * 1e4
    assert torch.equal(older(wide), older.decode(older.encode(wide)))


@pytest.mark.parametrize("norm", [0, -1.0, math.nan])
def test_what_is_no_norm(norm: float, tmp_path: Path) -> None:
    """With 0 an SAE would return all activations."""
    save_sae(tmp_path / "sae", with_norm(norm), {})
    with pytest.raises(SAEError, match="config.json: metadata: outlier_norm is .* above 0"):
        load_pretrained(str(tmp_path / "sae"))
    exported = saelens_files(with_norm(NORM))
    config = json.loads(exported["cfg.json"])
    config["metadata"]["outlier_norm"] = norm
    write_files(tmp_path / "theirs", exported | {"cfg.json": json.dumps(config).encode()})
    with pytest.raises(SAEError, match="outlier_norm is"):
        import_sae(tmp_path / "theirs")


@pytest.mark.parametrize("target", ["", "hook_mlp_out"])
def test_saelens_is_told_what_it_cannot_do(target: str, tmp_path: Path) -> None:
    """The export says it, and has the norm, so that it comes back."""
    sae = with_norm(NORM, dtype=torch.float32, target_hook_name=target)
    if target:
        sae.spec.metadata["target_outlier_norm"] = 3.0
    files = saelens_files(sae)
    said = json.loads(files["cfg.json"])["metadata"]
    assert said["outlier_norm"] == NORM and said.get("target_outlier_norm") == (
        3.0 if target else None
    )
    assert "SAELens has no such rule" in said["outliers"]
    write_files(tmp_path / "sae", files)
    back, x = import_sae(tmp_path / "sae"), X.float()
    assert back.spec.outlier_norms == sae.spec.outlier_norms
    assert torch.equal(back(x), sae(x))
    plain = json.loads(saelens_files(with_norm(None))["cfg.json"])["metadata"]
    assert not [key for key in plain if "outlier" in key]


# In its language model


@pytest.fixture(scope="module")
def tokens(windows: TokenWindows) -> Tensor:
    """(B, L)"""
    return windows.train(0, torch.arange(3))


@pytest.fixture(scope="module")
def with_sink(tiny_model: Path, tokens: Tensor) -> LanguageModel:
    """A model with activations a hundred times as long at one kind of token."""
    config = ModelConfig(model_name=str(tiny_model), model_dtype="float32")
    model = LanguageModel.load(config, torch.device("cpu"))
    with torch.no_grad():
        model.model.get_input_embeddings().weight[tokens[0, 5]] *= 100
    return model


def of_model(**changes: Any) -> SparseAutoencoder:
    """An SAE of the tiny model."""
    own = {"d_in": WIDTH, "d_sae": 64, "hook_layer": 1, "hook_name": "hook_resid_post"}
    return random_sae("batch_topk", torch.float32, **{**own, **changes}).requires_grad_(False)


def ce(model: LanguageModel, tokens: Tensor) -> float:
    with torch.no_grad():
        logits = model.model(tokens, use_cache=False).logits
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))


def test_a_planted_sink_costs_nothing(with_sink: LanguageModel, tokens: Tensor) -> None:
    """A splice has the cross-entropies that the evaluation gives, and by hand `sae(x)` has."""
    x = with_sink.activations(tokens, [HOOK])[HOOK]
    norms = x.norm(dim=-1)
    sae = of_model(metadata={"outlier_norm": 10 * float(norms[:, 1:].median())})
    is_sink = sae.is_outlier(x)
    assert is_sink[:, 1:].any() and is_sink.float().mean() < 0.1
    figures = evaluate(with_sink, sae, tokens, 3)
    with sae.spliced_into(with_sink):
        assert ce(with_sink, tokens) == pytest.approx(figures["ce_sae_sinks_kept"], rel=1e-5)
    sae.keeps_outliers = False
    with sae.spliced_into(with_sink):
        assert ce(with_sink, tokens) == pytest.approx(figures["ce_sae"], rel=1e-5)
    assert abs(figures["ce_sae"] - figures["ce_sae_sinks_kept"]) > 1e-3
    for keeps, suffix in ((True, "by_norm"), (False, "all_spliced")):
        sae.keeps_outliers = keeps
        _, found = with_sink.logits(tokens, [HOOK])
        logits, _ = with_sink.resume(tokens, found[HOOK], HOOK, sae(x))
        by_hand = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        assert float(by_hand) == pytest.approx(figures[f"ce_sae_{suffix}"], rel=1e-5)


Context = Callable[[SparseAutoencoder, LanguageModel], Any]
CONTEXTS: dict[str, Context] = {
    "spliced": lambda sae, model: sae.spliced_into(model),
    "steered": lambda sae, model: sae.steer(model, {3: 8.0}),
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("place", [HOOK, OUTPUT])
def test_outliers_keep_their_activation_at_the_target_too(
    place: Hook, context: str, language_model: LanguageModel, tokens: Tensor
) -> None:
    clean = language_model.activations(tokens, [place])[place]
    norms = clean.norm(dim=-1)
    limit = float(norms.quantile(0.7))
    if place == HOOK:
        sae = of_model(metadata={"outlier_norm": limit})
    else:
        where = {"hook_name": "mlp.hook_in", "target_hook_name": place.hook_name}
        sae = of_model(**where, metadata={"target_outlier_norm": limit})
    for keeps in (True, False):
        sae.keeps_outliers = keeps
        with CONTEXTS[context](sae, language_model), torch.no_grad():
            now = language_model.activations(tokens, [place])[place]
        moved = (now - clean).abs().amax(-1) > 1e-2
        wanted = norms <= limit if keeps else torch.ones_like(moved)
        assert torch.equal(moved[:, 1:], wanted[:, 1:]) and not moved[:, 0].any()


def test_a_text_shows_no_features_of_them(language_model: LanguageModel) -> None:
    text = "The energy of a particle"
    whole = read_text(language_model, of_model(), text, 3)
    ids = language_model.tokenizer(text).input_ids
    window = torch.tensor([[language_model.tokenizer.eos_token_id, *ids]])
    norms = language_model.activations(window, [HOOK])[HOOK].norm(dim=-1)[0, 1:]
    limit = float(norms.max()) * 0.999
    found = read_text(language_model, of_model(metadata={"outlier_norm": limit}), text, 3)
    at = int(norms.argmax())
    assert found[at] == whole[at]._replace(features=[], n_active=0) != whole[at]
    assert found[:at] + found[at + 1 :] == whole[:at] + whole[at + 1 :]
