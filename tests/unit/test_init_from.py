"""A training that begins with an SAE: of any kind, folded or another tool's, with more features."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from running import ROOT
from synthetic import (
    DENSE_KINDS,
    HOOK,
    KINDS,
    SparseDirections,
    SparseMap,
    made_up,
    normal,
    random_sae,
)
from torch import Tensor

from sae_core.formats.checkpoint import load_sae, save_sae, write_files
from sae_core.formats.saelens import saelens_files
from sae_core.models.language_model import Hook
from sae_core.pretrained import load_pretrained
from sae_core.sae.config import SAEConfig
from sae_core.sae.kinds import build
from sae_core.sae.normalisation import Normalisation
from sae_core.sae_base import SparseAutoencoder
from sae_core.sae_train import SAETrainer, train_sae
from sae_core.train_config import EndToEndConfig, RuntimeConfig, TrainingConfig
from sae_core.trainer.events import Observer
from sae_core.trainer.origin import begin_with, origin_of
from sae_core.trainer.training_inputs import Activations, Settings
from sae_core.utils.errors import SAEError
from sae_core.utils.seeding import generator
from sae_core.workflow.workflow_config import ModelPlan, load_plan

D, F, K = 16, 32, 4
MODEL = "made up"
GATED = ("gated", "jumprelu")
"""Kinds that can be any other but TopK."""


def raw() -> Tensor:
    """(N, D) activations far from the origin."""
    return 40 + 7 * normal(500, D, dtype=torch.float32)


def random_origin(kind: str, n_features: int = F, d_in: int = D, **changes: Any) -> Any:
    """A folded SAE that is active on some of `raw()`."""
    own: dict[str, Any] = {"d_in": d_in, "d_sae": n_features, "hook_layer": HOOK.layer}
    if kind == "matryoshka_batch_topk":
        own["matryoshka_sizes"] = [8, n_features]
    if kind not in DENSE_KINDS:
        own["top_k"] = K
    sae = random_sae(kind, torch.float32, **{**own, "metadata": {"model_name": MODEL}, **changes})
    with torch.no_grad():
        sae.b_dec += 40
        sae.b_enc *= 3
    return sae.requires_grad_(False)


def stored(folder: Path, sae: SparseAutoencoder) -> Path:
    save_sae(folder, sae, {})
    return folder


def begun(
    origin: Path, kind: str, x: Tensor, d_sae: int = F, **changes: Any
) -> tuple[SparseAutoencoder, SparseAutoencoder]:
    """An SAE of a kind as the training begins with an origin, folded, and as it was before."""
    config = SAEConfig(sae_type=kind, topk=K, sae_expansion=d_sae // D, init_from=str(origin))  # type: ignore[arg-type]
    found = origin_of(config, HOOK, None, D, MODEL, origin.parent / "new")
    assert found is not None
    sae = build(random_origin(kind, d_sae, **changes).spec)
    sae.initialise(generator(3, "weights"))
    fresh = build(sae.spec)
    fresh.load_state_dict(sae.state_dict())
    normalise = Normalisation.measure(x)
    begin_with(found, sae, normalise, normalise(x))
    return sae.folded(normalise.mean, normalise.scale, torch.float32), fresh


@pytest.mark.parametrize("target", ["", "hook_mlp_out"])
@pytest.mark.parametrize("kind", KINDS)
def test_unfolding_is_the_reverse_of_folding(kind: str, target: str) -> None:
    sae = random_sae(kind, target_hook_name=target)
    mean, scale = normal(6), 3.5
    out = (normal(6, seed=2), 0.5) if target else None
    back = sae.folded(mean, scale, torch.float64, out).unfolded(mean.float(), scale, out)
    for name, tensor in sae.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], tensor.to(back.W_dec.dtype)
                                   if tensor.is_floating_point() else tensor,
                                   rtol=1e-4, atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_step_0_reconstructs_as_the_origin(kind: str, tmp_path: Path) -> None:
    x, origin = raw(), random_origin(kind)
    sae, _ = begun(stored(tmp_path / "origin", origin), kind, x)
    assert (origin.encode(x) > 0).any()
    torch.testing.assert_close(sae.encode(x), origin.encode(x), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(sae(x), origin(x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("to", GATED)
@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"topk"}))
def test_another_kind_with_a_threshold_reconstructs_the_same(
    kind: str, to: str, tmp_path: Path
) -> None:
    x, origin = raw(), random_origin(kind)
    sae, _ = begun(stored(tmp_path / "origin", origin), to, x)
    assert sae.spec.sae_type == to
    torch.testing.assert_close(sae(x), origin(x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["batch_topk", "jumprelu", "gated"])
def test_a_standard_sae_has_the_same_features_each_weaker_by_its_threshold(
    kind: str, tmp_path: Path
) -> None:
    x, origin = raw(), random_origin(kind)
    sae, _ = begun(stored(tmp_path / "origin", origin), "standard", x)
    as_jump, _ = begun(tmp_path / "origin", "jumprelu", x)
    code, wanted = sae.encode(x), origin.encode(x)
    assert ((code > 0) != (wanted > 0)).float().mean() < 1e-3
    weaker = torch.relu(wanted - as_jump.known_threshold)
    torch.testing.assert_close(code, weaker, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "to"),
    [(kind, to) for kind in ("topk", "jumprelu") for to in ("batch_topk", "matryoshka_batch_topk")]
    + [("topk", to) for to in GATED],
)
def test_a_threshold_that_the_origin_lacks_is_found_for_k(
    kind: str, to: str, tmp_path: Path
) -> None:
    x = raw()
    sae, _ = begun(stored(tmp_path / "origin", random_origin(kind)), to, x)
    assert (sae.encode(x) > 0).sum(1).float().mean() == pytest.approx(K, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_added_features_are_those_of_a_fresh_sae(kind: str, tmp_path: Path) -> None:
    x, origin = raw(), random_origin(kind)
    sae, fresh = begun(stored(tmp_path / "origin", origin), kind, x, d_sae=2 * F)
    torch.testing.assert_close(sae.W_dec[:F], origin.W_dec)
    torch.testing.assert_close(sae.W_dec[F:], fresh.W_dec[F:])
    torch.testing.assert_close(sae.W_enc[:, F:], fresh.W_enc[:, F:])


def test_decoder_rows_of_other_norms_are_brought_to_one(tmp_path: Path) -> None:
    x, origin = raw(), random_origin("jumprelu")
    with torch.no_grad():
        origin.W_dec *= torch.linspace(0.5, 2, F)[:, None]
    sae, _ = begun(stored(tmp_path / "origin", origin), "jumprelu", x)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(F))
    torch.testing.assert_close(sae(x), origin(x), rtol=1e-4, atol=1e-3)


# Trainings


def source() -> SparseDirections:
    return SparseDirections(n_train=16)


def settings(origin: Path | None, kind: str = "batch_topk", **training: Any) -> Settings:
    return Settings(
        sae=SAEConfig(sae_type=kind, topk=K, sae_expansion=2, init_from=origin and str(origin)),  # type: ignore[arg-type]
        training=TrainingConfig(
            **{"num_epochs": 2, "early_stopping_patience": 0, "lr": 1e-4, **training}
        ),
        end_to_end=EndToEndConfig(use_end_to_end=False),
        runtime=RuntimeConfig(device="cpu", resume_minutes=0),
    )


def activations(wanted: Settings, output: Path, **others: Any) -> Activations:
    origin = origin_of(wanted.sae, HOOK, None, D, MODEL, output)
    return made_up(source(), origin=origin, **others)


def train(folder: Path, wanted: Settings) -> Path:
    output = folder / "new"
    return train_sae(activations(wanted, output), wanted, output, folder / "points", Observer())


def fvu(sae: SparseAutoencoder) -> float:
    x = source().read("validation", 0, torch.arange(8)).flatten(0, 1)
    return float((sae(x) - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SAE that has learned something."""
    return train(tmp_path_factory.mktemp("trained"), settings(None, num_epochs=12, lr=0.01))


def test_a_training_goes_on_from_its_origin(trained: Path, tmp_path: Path) -> None:
    before, after = load_sae(trained), load_sae(train(tmp_path, settings(trained)))
    alone = load_sae(train(tmp_path / "alone", settings(None)))
    assert fvu(after) < 1.001 * fvu(before) < 0.5 * fvu(alone)
    cosine = (after.W_dec * before.W_dec).sum(1)
    assert cosine.min() > 0.99
    assert after.spec.metadata["init_from"]["name"] == trained.name
    sha256 = json.loads((trained / "config.json").read_text())["weights_sha256"]
    assert after.spec.metadata["init_from"]["sha256"]["weights.pt"] == sha256


@pytest.mark.parametrize("training", [{"lr": 0.5}, {"lr": 0.5, "num_epochs": 1}])
def test_a_training_that_makes_it_worse_gives_its_origin(
    training: dict[str, Any], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another tool's, as imported, calibrated to the k of this training."""
    write_files(tmp_path / "theirs", saelens_files(load_sae(trained)))
    wanted = settings(tmp_path / "theirs", **training)
    after, before = load_sae(train(tmp_path, wanted)), load_sae(trained)
    torch.testing.assert_close(after.W_dec, before.W_dec)
    torch.testing.assert_close(after.b_enc, before.b_enc, rtol=1e-3, atol=1e-4)
    assert fvu(after) < 1.001 * fvu(before)
    x = source().read("validation", 0, torch.arange(8)).flatten(0, 1)
    assert (after.encode(x) > 0).sum(-1).float().mean() == pytest.approx(K, rel=0.05)
    assert after.spec.metadata["tokens"] == after.spec.metadata["epochs"] == 0
    said = capsys.readouterr().out
    assert "no epoch has a lower validation loss than the SAE that it began with" in said


@pytest.mark.parametrize("lr", [1e-4, 0.5])
def test_a_fine_tuning_that_is_killed_at_any_step_ends_the_same(
    lr: float, trained: Path, tmp_path: Path
) -> None:
    class Killed(Exception):
        pass

    class Kill(Observer):
        """Ends the training at a step, or when an SAE has been stored."""

        def __init__(self, at: int) -> None:
            self.left = at

        def on_step(self, *_: Any) -> None:
            self.left -= 1
            if self.left == 0:
                raise Killed

        def on_checkpoint(self, *_: Any, **__: Any) -> None:
            self.on_step()

    wanted = settings(trained, lr=lr)
    whole = train(tmp_path / "whole", wanted).joinpath("weights.pt").read_bytes()
    output, points = tmp_path / "new", tmp_path / "points"
    for at in itertools.count(1):
        try:
            train_sae(activations(wanted, output), wanted, output, points, Kill(at))
            break
        except Killed:
            assert at < 50
    assert at > 3
    assert (output / "weights.pt").read_bytes() == whole


def test_another_tools_directory(trained: Path, tmp_path: Path) -> None:
    """Its files lie alone, as SAELens would leave them."""
    files = saelens_files(load_sae(trained))
    write_files(tmp_path / "theirs", files)
    after = load_sae(train(tmp_path, settings(tmp_path / "theirs")))
    assert fvu(after) < 1.001 * fvu(load_sae(trained))
    assert set(after.spec.metadata["init_from"]["sha256"]) == {
        "cfg.json",
        "sae_weights.safetensors",
    }
    assert load_pretrained(tmp_path / "theirs").spec.d_sae == F


def test_a_run_name_is_looked_for_beside_the_sae(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "origin")
    train(tmp_path, settings(Path("origin")))


def test_the_same_origin_resumes_and_another_starts_over(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    origin = shutil.copytree(trained, tmp_path / "origin")
    first = train(tmp_path, settings(origin)).joinpath("weights.pt").read_bytes()
    states = tmp_path / "points/resume"
    state = {path.name for path in states.iterdir()}
    assert train(tmp_path, settings(origin)).joinpath("weights.pt").read_bytes() == first
    assert {path.name for path in states.iterdir()} == state  # no step was taken
    changed = load_sae(origin)
    changed.W_dec.data.neg_()
    save_sae(origin, changed, {})
    assert train(tmp_path, settings(origin)).joinpath("weights.pt").read_bytes() != first
    assert "init_from.sha256.weights.pt" in capsys.readouterr().out


def test_an_interrupted_training_goes_on_as_if_nothing_had_been(
    trained: Path, tmp_path: Path
) -> None:
    whole = train(tmp_path / "whole", settings(trained)).joinpath("weights.pt").read_bytes()
    wanted, points = settings(trained), tmp_path / "points"
    begun = SAETrainer(activations(wanted, tmp_path / "new"), wanted, points, Observer())
    begun.loop.begin()
    for number, batch in enumerate(begun.loop.rest_of_epoch()):
        if number == 2:
            break
        begun._step(batch)
        begun._save_state()
    assert train(tmp_path, wanted).joinpath("weights.pt").read_bytes() == whole


def test_a_transcoder_begins_with_a_transcoder(tmp_path: Path) -> None:
    target = Hook(1, "hook_mlp_out")
    origin = random_origin("batch_topk", target_hook_name=target.hook_name)
    stored(tmp_path / "origin", origin)
    wanted = settings(tmp_path / "origin", num_epochs=1, lr=1e-12)
    found = origin_of(wanted.sae, HOOK, target, D, MODEL, tmp_path / "new")
    inputs = made_up(SparseMap(), origin=found, target=target)
    folder = train_sae(inputs, wanted, tmp_path / "new", tmp_path / "points", Observer())
    after = load_sae(folder)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        ours, theirs = getattr(after, name), getattr(origin, name)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-3)


# Errors


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"n_features": 3 * F}, {}, "--sae-expansion 6 or more"),
        ({"d_in": 8}, {}, "width 8"),
        ({"hook_name": "hook_resid_pre"}, {}, "--hook-name"),
        ({"hook_layer": 2}, {}, "--hook-layer"),
        ({"target_hook_name": "hook_mlp_out"}, {}, "hook_mlp_out"),
        ({"metadata": {"model_name": "another"}}, {}, "--model-name"),
    ],
)
def test_an_origin_that_does_not_fit(
    changes: dict[str, Any], options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = stored(tmp_path / "origin", random_origin("batch_topk", **changes))
    with pytest.raises(SAEError, match=words) as caught:
        origin_of(settings(folder).sae, HOOK, None, D, MODEL, tmp_path / "new")
    assert "--init-from" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("recorded", [{}, {"model_name": "gemma-2-2b"}])
def test_a_model_without_its_owner_or_without_a_name(
    recorded: dict[str, Any], tmp_path: Path
) -> None:
    folder = stored(tmp_path / "origin", random_origin("batch_topk", metadata=recorded))
    config = settings(folder).sae
    assert origin_of(config, HOOK, None, D, "google/gemma-2-2b", tmp_path / "new")


def test_an_origin_is_not_written_over(tmp_path: Path) -> None:
    folder = stored(tmp_path / "origin", random_origin("batch_topk"))
    with pytest.raises(SAEError, match="written over"):
        origin_of(settings(folder).sae, HOOK, None, D, MODEL, tmp_path / "origin")


def test_no_such_origin(tmp_path: Path) -> None:
    with pytest.raises(SAEError, match="no such SAE directory"):
        origin_of(settings(Path("nowhere")).sae, HOOK, None, D, MODEL, tmp_path / "new")


def test_the_layer_stands_in_the_name() -> None:
    config = SAEConfig(init_from="a/b/x.{layer}.y")
    assert config.origin(7) == "a/b/x.7.y"
    assert config.tag == "btop128sae-ft" and SAEConfig().origin(7) is None


# The workflow's configuration


def planned(saes: list[dict[str, Any]], **entry: Any) -> ModelPlan:
    model = {"name": "m", "source": {"path": "x"}, "layers": [1, 3], "saes": saes, **entry}
    config = {"chapters": {"folders": {"a": "a"}}, "models": [model]}
    plan = load_plan(config, ROOT / "workflow/schemas/config.schema.yaml")
    return plan.models["m"]


def test_an_sae_that_begins_with_one_of_the_same_configuration() -> None:
    name = "m.blocks.{layer}.hook_resid_post.btop8sae.exp4"
    model = planned([{"topk": 8}, {"topk": 8, "init_from": name}])
    runs = list(model.runs(None))
    assert [model.origin_run(run, None) for run in runs] == [
        None, name.format(layer=1), None, name.format(layer=3)
    ]  # fmt: skip
    assert len({run.name for run in runs}) == 4


@pytest.mark.parametrize("folder", ["", "results/saes/"])
def test_an_sae_that_begins_with_itself_is_refused(folder: str) -> None:
    names = [f"{folder}m.blocks.1.hook_resid_post.btop{k}sae-ft.exp4" for k in (8, 16)]
    with pytest.raises(SAEError, match="begins with itself"):
        planned([{"topk": 8, "init_from": names[0]}], layers=[1])
    with pytest.raises(SAEError, match="begins with itself"):
        planned([{"topk": 8, "init_from": names[1]}, {"topk": 16, "init_from": names[0]}])


def test_a_changed_folder_retrains(tmp_path: Path) -> None:
    folder = stored(tmp_path / "origin", random_origin("batch_topk"))
    [run] = planned([{"init_from": str(folder)}], layers=[1]).runs(None)
    before = run.origin_sha256
    assert run.origin_sha256 == before != {}
    stored(folder, random_origin("batch_topk", seed=1))
    assert run.origin_sha256 != before
