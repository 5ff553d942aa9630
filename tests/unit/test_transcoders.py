"""Transcoders: an encoder of one activation whose decoder gives another."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from direct_evaluation import direct, mlp_input
from short_training import D, make_sae, train
from synthetic import BATCH_KINDS, DENSE_KINDS, KINDS, SparseMap, closed_form, normal, random_sae
from tiny_model import WIDTH
from torch import Tensor

from sae_core import load_pretrained
from sae_core.activations.shards import harvest
from sae_core.activations.store import CachedSource, StreamingSource
from sae_core.activations.token_windows import TokenWindows
from sae_core.evaluation.identity import identity
from sae_core.evaluation.metrics import evaluate
from sae_core.models.language_model import Hook, LanguageModel
from sae_core.sae.losses import reconstruction_loss
from sae_core.sae.normalisation import Normalisation
from sae_core.sae.reconstruction import Compute
from sae_core.sae_base import SparseAutoencoder
from sae_core.sae_train import train_from_model
from sae_core.train_config import EndToEndConfig, HookConfig, RunConfig
from sae_core.trainer.end_to_end import EndToEnd
from sae_core.training import Observer
from sae_core.utils import cli
from sae_core.utils.errors import SAEError
from sae_core.workflow.workflow_config import load_plan

SOURCE, TARGET = Hook(2, "mlp.hook_in"), Hook(2, "hook_mlp_out")
EXACT = {"rtol": 1e-10, "atol": 1e-10}
any_kind = pytest.mark.parametrize("kind", KINDS)


def transcoder(kind: str, dtype: torch.dtype = torch.float64, **changes: Any) -> SparseAutoencoder:
    return random_sae(kind, dtype, target_hook_name="hook_mlp_out", **changes)


# One transcoder


@any_kind
def test_encodes_x_as_it_is(kind: str) -> None:
    sae, x = transcoder(kind), normal(5, 7, 6)
    features = closed_form(sae, x)
    assert 0.1 < (features > 0).double().mean() < 0.6
    torch.testing.assert_close(sae.encode(x), features, **EXACT)
    torch.testing.assert_close(sae(x), features @ sae.W_dec + sae.b_dec, **EXACT)
    moved = transcoder(kind)
    moved.b_dec.data += 3.0
    torch.testing.assert_close(moved.encode(x), features, **EXACT)


@any_kind
@pytest.mark.parametrize("row_block", [None, 7])
def test_gradients_are_those_of_the_dense_formula(kind: str, row_block: int | None) -> None:
    sae, x, target = transcoder(kind), normal(30, 6), normal(30, 6, seed=2)
    made = sae.reconstruct(x, target, Compute(row_block))
    reconstruction_loss(target, made.x_hat).backward()
    twin = transcoder(kind)
    active = sae.encode(x) > 0
    if kind in BATCH_KINDS:
        pre = torch.relu(twin.pre_activations(x))
        active = pre >= pre.flatten().topk(30 * twin.spec.top_k).values[-1]
    magnitude = x @ twin.W_enc + twin.b_enc
    if kind == "gated":
        magnitude = x @ (twin.W_enc * twin.r_mag.exp()) + twin.b_mag
    x_hat = (magnitude * active) @ twin.W_dec + twin.b_dec
    torch.testing.assert_close(made.x_hat, x_hat, **EXACT)
    reconstruction_loss(target, x_hat).backward()
    for name in ("W_enc", "W_dec", "b_dec"):
        found, expected = getattr(sae, name).grad, getattr(twin, name).grad
        torch.testing.assert_close(found, expected, **EXACT)


def test_what_a_kind_adds_to_the_loss_is_about_the_target() -> None:
    x, target = normal(30, 6), normal(30, 6, seed=2)
    gated = transcoder("gated")
    by_gate = torch.relu(x @ gated.W_enc + gated.b_enc) @ gated.W_dec + gated.b_dec
    found = gated.reconstruct(x, target).kind_loss
    torch.testing.assert_close(found, reconstruction_loss(target, by_gate), **EXACT)
    nested = transcoder("matryoshka_batch_topk")
    code = nested.encode(x)
    parts = [code[:, :m] @ nested.W_dec[:m] + nested.b_dec for m in nested.spec.matryoshka_sizes]
    errors = [reconstruction_loss(target, part) for part in parts[:-1]]
    found = nested.reconstruct_at_inference(x, target).kind_loss
    torch.testing.assert_close(found, torch.stack(errors).mean().detach(), **EXACT)


def test_auxiliary_loss_is_about_the_target() -> None:
    sae, x, target = transcoder("batch_topk"), normal(40, 6), normal(40, 6, seed=2)
    sae.spec.top_k_aux = 20  # every positive one
    sae.num_batches_not_active[:8] = 1000
    x_hat = normal(40, 6, seed=3)
    dead = torch.relu(x @ sae.W_enc + sae.b_enc)[:, :8] @ sae.W_dec[:8]
    residual = target - x_hat
    variance = (residual - residual.mean(0)).pow(2).sum()
    expected = (dead - residual).pow(2).sum() / variance
    torch.testing.assert_close(sae.auxiliary_loss(x, x_hat, target).loss, expected, **EXACT)


@any_kind
def test_folded_takes_and_gives_raw_activations(kind: str) -> None:
    inner, x = transcoder(kind), normal(50, 6)
    mean, scale = 5 * normal(6, seed=4), 0.25
    m, s = 5 * normal(6, seed=5), 7.0
    outer = inner.folded(mean, scale, torch.float64, (m, s))
    raw = mean + scale * x
    torch.testing.assert_close(outer.encode(raw), s * inner.encode(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(outer(raw), m + s * inner(x), rtol=1e-9, atol=1e-9)
    assert torch.equal(outer.W_dec, inner.W_dec)
    assert outer.W_enc.T.is_contiguous()


# Training


@any_kind
def test_learns_what_makes_the_target_out_of_x(kind: str) -> None:
    """And takes and gives raw activations once it is folded."""
    source = SparseMap(n_train=256, n_validation=16)
    penalty = 0.02 if kind in DENSE_KINDS else 0.0
    sae = make_sae(kind, target_hook_name="hook_mlp_out", l1_coefficient=penalty)
    trainer = train(sae, source, num_epochs=6, lr=1e-2)
    normalise = trainer.normalise
    assert normalise.target is not None
    out = normalise.target.mean, normalise.target.scale
    folded = sae.folded(normalise.mean, normalise.scale, torch.float32, out)
    x, y = source.activations[-16:].flatten(0, 1).split(D, dim=1)
    error = float((y - folded(x).detach()).pow(2).sum(1).mean())
    assert error < 0.35 * float((y - y.mean(0)).pow(2).sum(1).mean())
    recon = error / normalise.target.scale**2
    assert trainer.history["val_recon_loss"][-1] == pytest.approx(recon, rel=1e-3)


def test_an_outlier_of_either_activation_trains_nothing() -> None:
    source = SparseMap()
    rows = source.activations.flatten(0, 1)
    rows[5, :D] *= 1000
    rows[7, D:] *= 1000
    halves = [Normalisation.measure(half) for half in rows.split(D, dim=1)]
    both = halves[0]._replace(target=halves[1])
    x, target = both.pair(rows[:10])
    kept = [0, 1, 2, 3, 4, 6, 8, 9]
    torch.testing.assert_close(x, halves[0].scaled(rows[kept, :D]))
    assert target is not None
    torch.testing.assert_close(target, halves[1].scaled(rows[kept, D:]))
    torch.testing.assert_close(both.raw(target), rows[kept, D:])


# Activations


def test_harvest_and_model_give_both_activations(
    language_model: LanguageModel, windows: TokenWindows, tmp_path: Path
) -> None:
    harvest(language_model, windows, [TARGET, SOURCE], tmp_path, batch_size=4)
    settings: dict[str, Any] = {"tokens_per_step": 64, "seed": 3, "target": TARGET}
    cached = CachedSource([tmp_path], SOURCE, **settings)
    streamed = StreamingSource(language_model, windows, SOURCE, batch_size=4, **settings)
    found = language_model.activations(windows.validation(torch.arange(2)), [SOURCE, TARGET])
    expected = torch.cat([found[SOURCE], found[TARGET]], dim=-1)[:, 1:]
    for source in (cached, streamed):
        torch.testing.assert_close(source.read("validation", 0, torch.arange(2)), expected)
    for ours, theirs in zip(cached.train_batches(0), streamed.train_batches(0), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_harvest_without_the_target_is_named(
    language_model: LanguageModel, windows: TokenWindows, tmp_path: Path
) -> None:
    harvest(language_model, windows, [SOURCE], tmp_path, batch_size=4)
    with pytest.raises(SAEError, match="has no activations of blocks.2.hook_mlp_out"):
        CachedSource([tmp_path], SOURCE, tokens_per_step=64, seed=3, target=TARGET)


# The language model with a transcoder in place of the MLP


def in_the_model(kind: str) -> SparseAutoencoder:
    where = {"hook_layer": 2, "hook_name": SOURCE.hook_name, "hook_spec": SOURCE.spec}
    return transcoder(kind, torch.float32, d_in=WIDTH, d_sae=2 * WIDTH, **where)


@any_kind
def test_evaluation_equals_a_direct_computation(
    kind: str, language_model: LanguageModel, windows: TokenWindows
) -> None:
    tokens = windows.evaluation()[:6]
    found = evaluate(language_model, in_the_model(kind), tokens, batch_size=4)
    expected = direct(language_model.model, in_the_model(kind), tokens, TARGET)
    assert set(found) == set(expected) and found["kl"] > 0.01
    for name in ("l0", "fvu", "fvu_with_outliers", "ce_clean", "ce_sae", "ce_mean_ablation",
                 "ce_zero_ablation", "kl", "block_mse_mean", "n_tokens"):  # fmt: skip
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name
    assert identity("name", in_the_model(kind).spec)["hook_spec"] == (
        "blocks.2.mlp.hook_in-hook_mlp_out"
    )


def test_outliers_of_the_target_are_counted_apart(
    language_model: LanguageModel, windows: TokenWindows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its input is normalised, and does not show them."""
    tokens = windows.evaluation()[:6]
    mlp = language_model.model.model.layers[2].mlp
    loud = mlp_input(language_model.model, tokens, 2)[0, 5].float()

    def forward(x: Tensor, plain: Any = mlp.forward) -> Tensor:
        is_loud = (x - loud).norm(dim=-1, keepdim=True) < 1e-3
        return plain(x) * torch.where(is_loud, 1000.0, 1.0)

    monkeypatch.setattr(mlp, "forward", forward)
    found = evaluate(language_model, in_the_model("topk"), tokens, batch_size=4)
    expected = direct(language_model.model, in_the_model("topk"), tokens, TARGET)
    assert found["n_outlier_tokens"] == expected["n_outlier_tokens"] > 0
    assert found["fvu"] == pytest.approx(expected["fvu"], rel=1e-4)
    assert found["kl"] == pytest.approx(expected["kl"], rel=1e-3)
    phase = EndToEnd(language_model, windows, SOURCE, EndToEndConfig(), 4, TARGET)
    norms = language_model.activations(tokens, [TARGET])[TARGET][:, 1:].norm(dim=-1)
    limit = 10 * float(norms.median())
    assert (
        sum(part.n_outliers for part in phase.clean(tokens, 1e9, limit))
        == (expected["n_outlier_tokens"])
    )


def test_end_to_end_losses_splice_at_the_target(
    language_model: LanguageModel, windows: TokenWindows
) -> None:
    config = EndToEndConfig(use_block_mse=True)
    phase = EndToEnd(language_model, windows, SOURCE, config, 4, TARGET)
    assert [point.layer for point in phase.later] == [2, 3]
    tokens = windows.evaluation()[:6]
    passes = phase.clean(tokens, 1e9, 1e9)
    sae = in_the_model("topk")
    x_hat = sae(torch.cat([part.x[part.kept] for part in passes])).detach().requires_grad_()
    loss, figures = phase.loss(passes, x_hat)
    [gradient] = torch.autograd.grad(loss, x_hat)
    clean, found = language_model.logits(tokens, [Hook(2, "hook_resid_pre"), TARGET])
    value = found[TARGET].clone()
    value[:, 1:] = x_hat.detach().view(6, -1, WIDTH)
    spliced, _ = language_model.resume(tokens, found[Hook(2, "hook_resid_pre")], TARGET, value)
    log_p, log_q = (torch.log_softmax(logits, -1) for logits in (clean, spliced))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[:, 1:].mean()
    assert float(figures["logit_kl"]) == pytest.approx(float(kl), rel=1e-3) and kl > 0.01
    assert gradient.shape == x_hat.shape and gradient.abs().sum() > 0


# Command line and workflow


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, texts: list[str]) -> Path:
    """A transcoder trained by the command line, with an end-to-end phase."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "texts.json").write_text(json.dumps(texts))
    argv = (
        f"--model-name {tiny_model} --data-path {folder}/texts.json --model-dtype float32 "
        "--device cpu --num-epochs 2 --max-text-length 32 --tokens-per-step 256 --topk 4 "
        "--sae-expansion 2 --hook-name mlp.hook_in --target-hook-name hook_mlp_out "
        f"--output-root {folder}/saes --checkpoint-root {folder}/points"
    )
    return train_from_model(cli.parse(RunConfig, "", argv.split()), Observer())


def test_command_line(made: Path, language_model: LanguageModel, windows: TokenWindows) -> None:
    assert made.name.endswith(".blocks.1.mlp.hook_in-hook_mlp_out.btop4sae.exp2")
    sae, history = load_pretrained(made, with_history=True)
    assert (sae.spec.hook_name, sae.spec.target_hook_name) == ("mlp.hook_in", "hook_mlp_out")
    assert sae.spec.target_hook_spec == "blocks.1.hook_mlp_out"
    assert history["logit_kl"][0] is None and history["logit_kl"][1] > 0
    source, target = Hook(1, "mlp.hook_in"), Hook(1, "hook_mlp_out")
    found = language_model.activations(windows.evaluation()[:6], [source, target])
    x, y = found[source][:, 1:].flatten(0, 1), found[target][:, 1:].flatten(0, 1)
    error = (y - sae(x)).pow(2).sum() / (y - y.mean(0)).pow(2).sum()
    assert error < 1 and error == pytest.approx(history["val_recon_loss"][-1], rel=0.1)
    scales = sae.spec.metadata
    assert scales["target_activation_scale"] < 0.1 * scales["activation_scale"]


def test_a_configuration_without_the_field_is_an_sae(made: Path, tmp_path: Path) -> None:
    config = json.loads((made / "config.json").read_text())
    del config["target_hook_name"]
    for path in made.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    x = normal(5, WIDTH, dtype=torch.float32)
    as_sae, sae = load_pretrained(tmp_path), load_pretrained(made)
    assert as_sae.spec.target_hook_name == "" and as_sae.spec.site == "blocks.1.mlp.hook_in"
    torch.testing.assert_close(as_sae.encode(x + sae.b_dec), sae.encode(x))


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("hook_mlp_out", "mlp.hook_in"),  # lies before it
        ("mlp.hook_in", "mlp.hook_in"),  # is no other
        ("mlp.hook_in", "hook_mlp"),  # is unknown
        ("hook_q", "hook_mlp_out"),
    ],
)
def test_a_wrong_target_is_named(source: str, target: str) -> None:
    with pytest.raises(SAEError, match=f"--target-hook-name {target}: .* order is hook_resid_pre"):
        HookConfig(hook_name=source, target_hook_name=target)


def test_a_target_of_a_layer_is_told_apart() -> None:
    with pytest.raises(
        SAEError, match="--target-hook-name blocks.3.hook_mlp_out: .*--hook-layer 3"
    ):
        HookConfig(hook_name="mlp.hook_in", target_hook_name="blocks.3.hook_mlp_out")


def test_a_target_that_the_model_lacks_is_named_before_it_is_loaded(
    made: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from sae_core.trainer import checked_run

    facts = checked_run.model_facts

    def without_mid(config: Any) -> Any:
        found = facts(config)
        return found._replace(hook_names=tuple(n for n in found.hook_names if "mid" not in n))

    monkeypatch.setattr(checked_run, "model_facts", without_mid)
    monkeypatch.delattr(LanguageModel, "load")
    argv = f"--model-name {tiny_model} --data-path {made.parents[1]}/texts.json"
    argv += " --hook-name hook_attn_out --target-hook-name hook_resid_mid"
    config = cli.parse(RunConfig, "", argv.split())
    config = dataclasses.replace(
        config, output=dataclasses.replace(config.output, output_root=tmp_path)
    )
    with pytest.raises(SAEError, match="--target-hook-name hook_resid_mid: this model has"):
        train_from_model(config, Observer())


def test_workflow_configuration(root: Path) -> None:
    schema = root / "workflow/schemas/config.schema.yaml"
    config = yaml.safe_load((root / "config/demo.yaml").read_text(encoding="utf-8"))
    [entry] = config["models"][:1]
    entry |= {"layers": [3, 5], "hook_name": "mlp.hook_in", "target_hook_name": "hook_mlp_out"}
    plan = load_plan(config, schema)
    model = next(iter(plan.models.values()))
    run, *_ = model.runs(None)
    assert ".blocks.3.mlp.hook_in-hook_mlp_out." in run.name and plan.model_of(run.name) is model
    assert model.hook_specs("3+5", None) == [
        "blocks.3.mlp.hook_in", "blocks.5.mlp.hook_in",
        "blocks.3.hook_mlp_out", "blocks.5.hook_mlp_out",
    ]  # fmt: skip
    options = plan.train_options(run)
    assert options.startswith("--hook blocks.3.mlp.hook_in --target-hook-name hook_mlp_out ")
    entry |= {"target_hook_name": "hook_attn_out"}
    with pytest.raises(SAEError, match=r"config: models\[0\]: target_hook_name hook_attn_out: "):
        load_plan(config, schema)
