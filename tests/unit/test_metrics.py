"""The figures of an SAE against a direct computation with plain transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from by_definition import in_memory, split_texts, stream
from direct_evaluation import direct
from synthetic import KINDS, random_sae, spec
from tiny_model import N_LAYERS, WIDTH, make_tiny_model
from torch import Tensor
from transformers import ByT5Tokenizer

from sae_core.activations.token_windows import TokenWindows, read_windows
from sae_core.evaluation.identity import density_histogram
from sae_core.evaluation.metrics import SPLICES, evaluate, held_out_repeated, held_out_windows
from sae_core.models.language_model import Hook, LanguageModel
from sae_core.sae import losses
from sae_core.sae.kinds import build
from sae_core.sae_base import SparseAutoencoder
from sae_core.train_config import DataConfig, ModelConfig
from sae_core.utils.errors import SAEError
from sae_core.workflow import planning

CPU = torch.device("cpu")
POST = Hook(1, "hook_resid_post")
N_WINDOWS = 6


@pytest.fixture(scope="module")
def evaluated(windows: TokenWindows) -> Tensor:
    return windows.evaluation()[:N_WINDOWS]


def load_llama(folder: Path, text: str) -> LanguageModel:
    """A model whose output matrix is not its embedding, which may therefore be changed."""
    make_tiny_model(folder, text, "llama")
    return LanguageModel.load(ModelConfig(model_name=str(folder), model_dtype="float32"), CPU)


@pytest.fixture(scope="module")
def with_sinks(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], evaluated: Tensor
) -> LanguageModel:
    """A model with activations a hundred times as large at two kinds of token."""
    model = load_llama(tmp_path_factory.mktemp("m") / "sinks", " ".join(texts))
    with torch.no_grad():
        loud = evaluated[0, [0, 5]]  # a window's first token, which never counts, and another
        model.model.get_input_embeddings().weight[loud] *= 100
    return model


def hooked(hook: Hook, kind: str = "batch_topk", seed: int = 0) -> SparseAutoencoder:
    """A random SAE of the tiny model's width at this hook."""
    where = {"hook_layer": hook.layer, "hook_name": hook.hook_name, "hook_spec": hook.spec}
    return random_sae(kind, torch.float32, seed, d_in=WIDTH, d_sae=2 * WIDTH, **where)


def assert_close(found: dict[str, Any], expected: dict[str, Any], rel: float = 1e-4) -> None:
    assert set(found) == set(expected)
    ce_zero, lost = found["ce_zero_ablation"], found["ce_zero_ablation"] - found["ce_clean"]
    # its parts are compared: a random model may lose so little that the quotient is all rounding
    expected = expected | {
        f"loss_recovered{suffix}": (ce_zero - found[f"ce_sae{suffix}"]) / lost for suffix in SPLICES
    }
    for key, value in expected.items():
        if isinstance(value, dict) and key != "density_histogram":
            value, found[key] = pytest.approx(value, rel=rel), found[key]
        elif isinstance(value, float):
            value = pytest.approx(value, rel=rel, abs=1e-9)
        assert found[key] == value, key


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "hook", [POST, Hook(2, "hook_mlp_out"), Hook(N_LAYERS - 1, "hook_resid_post")]
)
def test_equals_a_direct_computation(
    hook: Hook, kind: str, language_model: LanguageModel, evaluated: Tensor
) -> None:
    found = evaluate(language_model, hooked(hook, kind), evaluated, batch_size=4)
    expected = direct(language_model.model, hooked(hook, kind), evaluated, hook)
    assert_close(found, expected)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["kl"] > 0.01 and found["n_outlier_tokens"] == 0
    assert (found["block_mse_mean"] is None) == (hook.layer == N_LAYERS - 1)


def test_outliers_are_spliced_and_counted_apart(
    with_sinks: LanguageModel, evaluated: Tensor
) -> None:
    found = evaluate(with_sinks, hooked(POST), evaluated, batch_size=4)
    assert_close(found, direct(with_sinks.model, hooked(POST), evaluated, POST))
    assert 0 < found["n_outlier_tokens"] < 0.1 * found["n_tokens"]
    assert found["n_tokens"] + found["n_outlier_tokens"] == evaluated[:, 1:].numel()
    assert found["fvu"] != pytest.approx(found["fvu_with_outliers"], rel=0.1)


class RuinedAtFirst(torch.nn.Module):
    """An SAE that gives nonsense wherever it reads one of these activations, (n, D)."""

    def __init__(self, sae: SparseAutoencoder, bad: Tensor) -> None:
        super().__init__()
        self.sae, self.spec, self.bad, self.threshold = sae, sae.spec, bad, sae.threshold
        self.is_outlier = sae.is_outlier

    def encode(self, x: Tensor) -> Tensor:
        self.is_bad = (x[..., None, :] == self.bad).all(-1).any(-1)
        return self.sae.encode(x)

    def decode(self, features: Tensor) -> Tensor:
        return torch.where(self.is_bad[..., None], 1e3, self.sae.decode(features))


@pytest.mark.parametrize("bos", [True, False])
def test_an_sae_that_is_ruined_at_position_0_alone(
    bos: bool, tmp_path: Path, texts: list[str]
) -> None:
    """It never trained there, with a BOS token or without: only the figures of every token
    spliced suffer."""
    path = make_tiny_model(tmp_path / "m", " ".join(texts), "llama", bos)
    model = LanguageModel.load(ModelConfig(model_name=str(path), model_dtype="float32"), CPU)
    data = DataConfig(max_text_length=24, val_fraction=0.25)
    tokens = read_windows(model.tokenizer, texts, data).evaluation()[:N_WINDOWS]
    assert bool((tokens[:, 0] == 1).all()) == bos
    sound, first = linear(1.0), model.activations(tokens, [POST])[POST][:, 0]
    found, ruined = (
        evaluate(model, sae, tokens, batch_size=4) for sae in (sound, RuinedAtFirst(sound, first))
    )
    suffering = {
        f"{name}{suffix}"
        for name in ("ce_sae", "kl", "loss_recovered")
        for suffix in ("_all_spliced", "_by_norm")  # the SAE records no norm
    }
    assert {name for name in found if found[name] != ruined[name]} == suffering
    assert found["kl_all_spliced"] < 1e-6 and ruined["kl_all_spliced"] > 1e-4
    counts = [found[f"n_left_alone{suffix}"] for suffix in SPLICES]
    assert counts == [N_WINDOWS, 0, N_WINDOWS, 0]


def test_tokens_left_alone_are_counted(with_sinks: LanguageModel, evaluated: Tensor) -> None:
    found = evaluate(with_sinks, linear(0.0), evaluated, batch_size=4)
    assert found["n_left_alone"] == len(evaluated)
    assert found["n_left_alone_sinks_kept"] == len(evaluated) + found["n_outlier_tokens"]
    assert found["ce_sae_sinks_kept"] != pytest.approx(found["ce_sae"], rel=1e-4)
    assert found["ce_sae_all_spliced"] != pytest.approx(found["ce_sae"], rel=1e-4)


def test_an_sae_that_records_its_norm_leaves_sinks_alone(
    with_sinks: LanguageModel, evaluated: Tensor
) -> None:
    """The first token of a window too, but only where it is a sink. The other figures are those of
    an SAE that records none."""
    norms = with_sinks.activations(evaluated, [POST])[POST].norm(dim=-1)
    recorded = 10 * float(norms[:, 1:].median())
    sinks = norms > recorded
    assert 0 < int(sinks[:, 0].sum()) < len(sinks) and sinks[:, 1:].any()
    sae = hooked(POST)
    plain = evaluate(with_sinks, sae, evaluated, batch_size=4)
    assert plain["n_left_alone_by_norm"] == 0
    assert plain["ce_sae_by_norm"] == plain["ce_sae_all_spliced"]
    sae.spec.metadata["outlier_norm"] = recorded
    found = evaluate(with_sinks, sae, evaluated, batch_size=4)
    assert_close(found, direct(with_sinks.model, sae, evaluated, POST))
    assert found["n_left_alone_by_norm"] == int(sinks.sum())
    assert {name for name in found if found[name] != plain[name]} == {
        f"{name}_by_norm" for name in ("ce_sae", "kl", "loss_recovered", "n_left_alone")
    }


def test_variance_about_a_large_mean(tmp_path: Path, texts: list[str], evaluated: Tensor) -> None:
    """The mean's square is thousands of times the variance, as in a trained model's residual."""
    model = load_llama(tmp_path / "m", " ".join(texts))
    with torch.no_grad():
        model.model.get_input_embeddings().weight += 50.0
    expected = direct(model.model, hooked(POST), evaluated, POST)
    found = evaluate(model, hooked(POST), evaluated, batch_size=4)
    assert found["fvu"] == pytest.approx(expected["fvu"], rel=1e-3)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_batch_size_changes_nothing(
    batch_size: int, with_sinks: LanguageModel, evaluated: Tensor
) -> None:
    found = evaluate(with_sinks, hooked(POST), evaluated, batch_size=batch_size)
    assert_close(found, evaluate(with_sinks, hooked(POST), evaluated, batch_size=4), rel=1e-5)


@pytest.mark.parametrize("rows", [1, 7])
def test_how_many_logits_stay_in_cache_changes_nothing(
    rows: int,
    language_model: LanguageModel,
    evaluated: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = evaluate(language_model, hooked(POST), evaluated, batch_size=4)
    vocabulary = language_model.unembed(torch.zeros(1, WIDTH)).shape[1]
    monkeypatch.setattr(losses, "CACHED_LOGITS", rows * vocabulary)
    assert evaluate(language_model, hooked(POST), evaluated, batch_size=4) == found


def test_the_plan_knows_the_passes_and_logits(
    language_model: LanguageModel, evaluated: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without sinks two choices of tokens left alone differ. The clean model's logits serve for its
    cross-entropy and for each KL."""
    resumed, unembedded = [], []
    resume, unembed = language_model.resume_hidden, language_model.unembed

    def resumed_with(tokens: Tensor, *given: Any) -> Any:
        resumed.append(tokens.numel())
        return resume(tokens, *given)

    def unembedded_with(rows: Tensor) -> Tensor:
        unembedded.append(len(rows))
        return unembed(rows)

    monkeypatch.setattr(language_model, "resume_hidden", resumed_with)
    monkeypatch.setattr(language_model, "unembed", unembedded_with)
    evaluate(language_model, hooked(POST), evaluated, batch_size=4)
    assert sum(resumed) == planning.EVALUATED_PASSES * evaluated.numel()
    assert sum(unembedded) == (1 + planning.EVALUATED_PASSES) * evaluated[:, 1:].numel()


def linear(decoder: float, b_dec: Tensor | None = None) -> SparseAutoencoder:
    """`x_hat = decoder * x + b_dec`, from features relu(x) and relu(-x)."""
    sae = build(spec("standard", d_in=WIDTH, d_sae=2 * WIDTH))
    both = torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)])
    with torch.no_grad():
        sae.W_enc.copy_(both.T)
        sae.W_dec.copy_(decoder * both)
        if b_dec is not None:
            sae.b_dec.copy_(b_dec)
            sae.b_enc.fill_(-1e6)
    return sae


def test_identity_recovers_everything(language_model: LanguageModel, evaluated: Tensor) -> None:
    found = evaluate(language_model, linear(1.0), evaluated, batch_size=4)
    assert found["ce_sae"] == pytest.approx(found["ce_clean"], abs=1e-6)
    assert found["loss_recovered"] == pytest.approx(1, abs=1e-5)
    assert found["fvu"] == found["fvu_with_outliers"] == pytest.approx(0, abs=1e-12)
    assert found["kl"] == pytest.approx(0, abs=1e-6) and found["block_mse_max"] < 1e-9
    assert found["l0"] == WIDTH and set(found["l0_quantiles"].values()) == {float(WIDTH)}
    assert found["dead_fraction"] == 0 and found["density_histogram"]["never"] == 0


def test_zero_and_mean_are_the_ablations(language_model: LanguageModel, evaluated: Tensor) -> None:
    x = language_model.activations(evaluated, [POST])[POST]
    zero = evaluate(language_model, linear(0.0), evaluated, batch_size=4)
    assert zero["ce_sae_all_spliced"] == pytest.approx(zero["ce_zero_ablation"], abs=1e-6)
    assert zero["loss_recovered_all_spliced"] == pytest.approx(0, abs=1e-5)
    mean = evaluate(language_model, linear(1.0, x.mean((0, 1))), evaluated, batch_size=4)
    assert mean["ce_sae_all_spliced"] == pytest.approx(mean["ce_mean_ablation"], abs=1e-6)
    assert mean["ce_mean_ablation"] != pytest.approx(mean["ce_zero_ablation"], abs=1e-3)
    assert mean["fvu"] == pytest.approx(1, abs=0.02)  # but for position 0, part of the mean
    assert mean["dead_fraction"] == 1 and mean["density_histogram"]["never"] == 2 * WIDTH


# The windows


@pytest.mark.parametrize("most", [3, 10_000])
def test_held_out_windows_did_not_validate(
    most: int, language_model: LanguageModel, texts: list[str]
) -> None:
    data = {"max_text_length": 24, "val_fraction": 0.25, "seed": 5}
    windows = read_windows(language_model.tokenizer, texts, DataConfig(**data))
    described = spec(metadata={**data, "model_name": "x"})
    file = in_memory(language_model.tokenizer, texts)
    held_out = held_out_windows(described, language_model.tokenizer, file, most)
    assert torch.equal(held_out, windows.evaluation()[:most])
    assert len(held_out) == min(most, windows.n_evaluation)
    seen = {tuple(row) for row in windows.validation().tolist()}
    assert not seen & {tuple(row) for row in held_out.tolist()}


@pytest.mark.parametrize("val_fraction", [0.0, 0.05])
def test_nothing_left_to_evaluate(
    val_fraction: float, language_model: LanguageModel, texts: list[str]
) -> None:
    """None held out, or a single text that is a single window, which validates."""
    _, held_out = split_texts(texts, val_fraction, 0)
    length = max(2, len(stream(language_model.tokenizer, held_out)))
    data = {"max_text_length": length, "val_fraction": val_fraction, "seed": 0}
    with pytest.raises(SAEError, match="--val-fraction: the held-out texts give less than two"):
        file = in_memory(language_model.tokenizer, texts)
        held_out_windows(spec(metadata=data), language_model.tokenizer, file, 8)


@pytest.mark.parametrize("n_tokens", [100, 10**5, 10**7])
def test_density_histogram_counts_every_feature(n_tokens: int) -> None:
    active = torch.tensor([0, 0, 0, 1, 2, 50, 99, 100]) * torch.tensor(n_tokens / 100).clamp(max=1)
    active = torch.where(active == 100, n_tokens, active)
    histogram = density_histogram(active / n_tokens)
    edges, counts = histogram["log10_edges"], histogram["counts"]
    assert histogram["never"] == 3 and sum(counts) + 3 == len(active)
    assert len(edges) == len(counts) + 1 and (edges[0], edges[-1]) == (-6.0, 0.0)
    assert counts[-1] >= 1  # active on every token


def test_held_out_text_that_training_has_too() -> None:
    own = [f"{i} " + " ".join(f"w{i}-{j}" for j in range(20)) for i in range(40)]
    of_sae = spec("standard", metadata={"val_fraction": 0.5, "seed": 3})
    assert held_out_repeated(of_sae, in_memory(ByT5Tokenizer(), own)) == 0
    train, held_out = split_texts(own, 0.5, 3)
    twice = [f"{text} {train[0]}" if text == held_out[0] else text for text in own]
    total = sum(len(text) - 39 for text in split_texts(twice, 0.5, 3)[1])
    assert (
        held_out_repeated(of_sae, in_memory(ByT5Tokenizer(), twice)) == (len(train[0]) - 39) / total
    )
