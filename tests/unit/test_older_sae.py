"""SAE directories of the trainer before this one: loaded, calibrated, evaluated, browsed, exported
and published."""

import csv
import importlib.util
import io
import json
import os
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from by_definition import in_memory
from older import K, older_features, write_older_sae
from published import hub_here
from safetensors.torch import load_file
from synthetic import normal, random_sae
from tiny_model import N_LAYERS, WIDTH

from sae_core import load_pretrained
from sae_core.corpus.corpora import json_list
from sae_core.corpus.tokenise import tokenise
from sae_core.evaluation.metrics import evaluate, held_out_windows
from sae_core.formats import import_sae
from sae_core.formats.checkpoint import load_sae, sae_files, save_sae
from sae_core.formats.saelens import saelens_files
from sae_core.model_training import eval_sae_minibatch
from sae_core.models.language_model import Hook, LanguageModel
from sae_core.models.model_sources import ModelRecord
from sae_core.publishing import hub
from sae_core.reporting.page import read_run
from sae_core.settings.services import RepoConfig
from sae_core.settings.steps import EvaluationConfig, FeaturesConfig
from sae_core.settings.texts import TextsConfig
from sae_core.train_config import LoadConfig
from sae_core.utils.errors import SAEError

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("batch_topk", "standard")
X = normal(200, WIDTH, dtype=torch.float32) + 0.5


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(kind: str, tmp_path: Path) -> Path:
    write_older_sae(tmp_path / "older", kind)
    return tmp_path / "older"


# Loading and encoding


@pytest.mark.parametrize("layer", ["1", 1, "27"])
def test_it_computes_what_its_trainer_computed(kind: str, layer: int | str, tmp_path: Path) -> None:
    tensors = write_older_sae(tmp_path / "older", kind, layer)
    sae = load_pretrained(tmp_path / "older")
    assert (sae.spec.sae_type, sae.spec.hook_layer) == (kind, int(layer))
    assert (sae.spec.dtype, sae.W_dec.dtype, str(sae.W_dec.device)) == (
        "float32", torch.float32, "cpu",
    )  # fmt: skip
    assert sae.spec.top_k == (K if kind == "batch_topk" else 0)
    assert torch.equal(sae.ever_fired, tensors["ever_fired"])
    counts = tensors.get("num_batches_not_active", torch.zeros(64))
    assert torch.equal(sae.num_batches_not_active, counts.long())
    sae.calibrate(X)
    features = older_features(kind, tensors, X)
    torch.testing.assert_close(sae.encode(X), features)
    torch.testing.assert_close(sae.encode_sparse(X).to_dense(), features)
    torch.testing.assert_close(sae(X), features @ tensors["W_dec"] + tensors["b_dec"])
    if kind == "batch_topk":
        assert (features > 0).sum() == (sae.encode(X) > 0).sum() == K * len(X)


@pytest.mark.parametrize("missing", [["ever_fired"], ["ever_fired", "num_batches_not_active"]])
def test_it_needs_no_counters(kind: str, missing: list[str], tmp_path: Path) -> None:
    tensors = write_older_sae(tmp_path / "older", kind)
    stored = {name: tensor for name, tensor in tensors.items() if name not in missing}
    torch.save(stored, tmp_path / "older/weights.pt")
    assert not load_sae(tmp_path / "older").ever_fired.any()


def test_weights_of_a_device_that_is_not_here(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
    tensors = write_older_sae(tmp_path / "older", kind)
    monkeypatch.undo()
    assert b"cuda:3" in (tmp_path / "older/weights.pt").read_bytes()
    assert torch.equal(load_sae(tmp_path / "older").W_enc, tensors["W_enc"])


def test_without_a_threshold_it_does_not_encode(tmp_path: Path) -> None:
    write_older_sae(tmp_path / "older")
    sae = load_pretrained(tmp_path / "older")
    for use in (sae.encode, sae.encode_sparse, sae, sae.reconstruct_at_inference):
        with pytest.raises(SAEError, match=r"threshold=\.\.\.\), .* sae\.calibrate\(activations\)"):
            use(X)
    for store in (sae.tensors, lambda: saelens_files(sae), lambda: sae_files(sae, {})):
        with pytest.raises(SAEError, match="stored without a threshold"):
            store()


def test_a_threshold_that_is_given(tmp_path: Path) -> None:
    tensors = write_older_sae(tmp_path / "older")
    sae, history = load_pretrained(tmp_path / "older", threshold=0.75, with_history=True)
    pre = (X - tensors["b_dec"]) @ tensors["W_enc"]
    torch.testing.assert_close(sae.encode(X), pre * (pre > 0.75))
    assert history["loss"] == [1.5, 1.0]
    # A token's features depend on that token alone.
    torch.testing.assert_close(sae.encode(X[:3]), sae.encode(X)[:3])
    save_sae(tmp_path / "new", sae, {})
    assert torch.equal(load_sae(tmp_path / "new").encode(X), sae.encode(X))


@pytest.mark.parametrize("threshold", [-0.1, float("nan"), float("inf")])
def test_what_is_no_threshold(threshold: float, tmp_path: Path) -> None:
    write_older_sae(tmp_path / "older")
    with pytest.raises(SAEError, match=f"threshold {threshold}"):
        load_pretrained(tmp_path / "older", threshold=threshold)


@pytest.mark.parametrize("other", ["standard", "jumprelu", "gated", "topk"])
def test_other_kinds_have_no_threshold_to_set(other: str, tmp_path: Path) -> None:
    save_sae(tmp_path / "sae", random_sae(other), {})
    with pytest.raises(SAEError, match=f"a {other} SAE has none to set"):
        load_pretrained(tmp_path / "sae", threshold=0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_calibration_in_other_number_formats(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = write_older_sae(tmp_path / "older")
    weights = ("W_enc", "b_enc", "W_dec", "b_dec")
    config = json.loads((tmp_path / "older/config.json").read_text()) | {"dtype": str(dtype)}
    (tmp_path / "older/config.json").write_text(json.dumps(config))
    torch.save(tensors | {n: tensors[n].to(dtype) for n in weights}, tmp_path / "older/weights.pt")
    sae = load_sae(tmp_path / "older")
    sae.calibrate(X)
    assert sae.known_threshold.dtype == sae.W_enc.dtype == dtype
    n_active = float((sae.encode(X.to(dtype)) > 0).sum()) / len(X)
    assert n_active == pytest.approx(K, rel=0.02)


def test_calibration_takes_one_tensor_or_several_of_any_shape(tmp_path: Path) -> None:
    write_older_sae(tmp_path / "older")
    thresholds = []
    for activations in (X, iter([X[:50], X[50:]]), X.view(4, 50, WIDTH), X.double()):
        sae = load_sae(tmp_path / "older")
        sae.calibrate(activations)
        thresholds.append(float(sae.known_threshold))
    assert thresholds == pytest.approx(thresholds[:1] * 4)


def test_a_bias_that_was_never_added_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = write_older_sae(tmp_path / "zero")
    load_sae(tmp_path / "zero")
    assert capsys.readouterr().err == ""
    bias = normal(64, seed=9, dtype=torch.float32)
    write_older_sae(tmp_path / "older", b_enc=bias)
    sae = load_sae(tmp_path / "older")
    assert f"{tmp_path / 'older'}: b_enc is left out" in capsys.readouterr().err
    assert "b_enc" in sae.spec.metadata["left_out"]
    sae.calibrate(X)
    torch.testing.assert_close(sae.encode(X), older_features("batch_topk", tensors, X))


def test_with_a_threshold_of_its_own_the_bias_is_added(tmp_path: Path) -> None:
    """The first version of this project wrote the same keys, a threshold, and meant its `b_enc`."""
    bias = normal(64, seed=9, dtype=torch.float32)
    tensors = write_older_sae(tmp_path / "first", b_enc=bias, threshold=torch.tensor(0.5))
    pre = (X - tensors["b_dec"]) @ tensors["W_enc"] + bias
    torch.testing.assert_close(load_sae(tmp_path / "first").encode(X), pre * (pre > 0.5))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hook_layer", "nine"), ("hook_layer", "-1"), ("hook_layer", ""), ("hook_layer", 1.5),
        ("hook_layer", "1" * 5000), ("hook_layer", None), ("dtype", "torch.int8"), ("dtype", None),
        ("top_k", -5), ("top_k", "5"), ("top_k", 65), ("top_k_aux", -1), ("n_batches_to_dead", -1),
        ("l1_coefficient", float("nan")), ("aux_penalty", float("inf")), ("d_in", 0),
        ("matryoshka_sizes", [3, 2, 64]), ("matryoshka_sizes", [-1, 64]),
        ("hook_spec", "blocks.2.hook_resid_post"), ("hook_spec", "blocks.1.hook_mlp_out"),
        ("metadata", {"outlier_norm": "high"}),
    ],
)  # fmt: skip
def test_an_odd_value_is_named(folder: Path, key: str, value: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | {key: value}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SAEError) as error:
        load_sae(folder)
    named = next(iter(value)) if isinstance(value, dict) else key
    assert str(error.value).startswith(f"{folder / 'config.json'}: ")
    assert named in str(error.value) and "\n" not in str(error.value)
    assert "<class" not in str(error.value)


# Evaluation and features


@pytest.fixture
def data_path(tmp_path: Path, texts: list[str]) -> Path:
    """Enough text for the settings that an SAE without a record of its own is evaluated with."""
    path = tmp_path / "texts.json"
    path.write_text(json.dumps([text + str(number) for number in range(6) for text in texts]))
    return path


@pytest.fixture
def record(tiny_model: Path, tmp_path: Path) -> Path:
    path = tmp_path / "model.json"
    ModelRecord("me/tiny", "a folder", None, str(tiny_model), N_LAYERS, WIDTH, []).save(path)
    return path


def script(name: str) -> ModuleType:
    """A script of the workflow, to call its functions."""
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / f"scripts/{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_side_by_side(
    tmp_path: Path, tiny_model: Path, data_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in KINDS:
        write_older_sae(tmp_path / kind, kind)
    new = random_sae("batch_topk", torch.float32, d_in=WIDTH, d_sae=64)
    save_sae(tmp_path / "new", new, {})
    options = eval_sae_minibatch.Minibatch(
        tuple(tmp_path / name for name in (*KINDS, "new")),
        str(tiny_model), num_windows=2, json=True, texts=TextsConfig(data_path=data_path),
    )  # fmt: skip
    eval_sae_minibatch.show(options)
    said = capsys.readouterr()
    older, standard, new_figures = json.loads(said.out)
    assert older["l0"] == pytest.approx(K, abs=1 / older["n_tokens"])
    assert older["calibration"]["n_tokens"] == older["n_tokens"]
    assert f"{older['calibration']['threshold']:.6g} gives these texts 5 active" in said.err
    assert said.err.count("without a threshold") == 1
    assert "calibration" not in standard and "calibration" not in new_figures
    assert standard["model_name"] == tiny_model.name


def test_no_model_is_asked_for_by_an_option(tmp_path: Path) -> None:
    write_older_sae(tmp_path / "older")
    with pytest.raises(SAEError, match="--model-name"):
        eval_sae_minibatch.measure(eval_sae_minibatch.Minibatch((tmp_path / "older",)))


def test_each_text_has_its_own_threshold(
    tmp_path: Path, language_model: LanguageModel, texts: list[str]
) -> None:
    """What was calibrated for one evaluation is not taken for another."""
    write_older_sae(tmp_path / "older")
    sae = load_sae(tmp_path / "older")
    sae.spec.metadata["max_text_length"] = 32
    file = in_memory(language_model.tokenizer, texts)
    windows = held_out_windows(sae.spec, language_model.tokenizer, file, 4)
    found = [evaluate(language_model, sae, part, 2) for part in windows.split(2)]
    assert [figures["l0"] for figures in found] == pytest.approx([K, K], abs=0.02)
    thresholds = {figures["calibration"]["threshold"] for figures in found}
    assert len(thresholds) == 2 and sae.threshold is None
    # The tokens with the features that a batch of them has.
    hook = Hook(1, "hook_resid_post")
    x = language_model.activations(windows[:2], [hook])[hook][:, 1:].flatten(0, 1)
    own = older_features("batch_topk", sae.state_dict(), x)
    sae.calibrate(x)
    torch.testing.assert_close(sae.encode(x), own)


def test_the_workflows_scripts(
    record: Path, data_path: Path, tmp_path: Path, language_model: LanguageModel
) -> None:
    """From evaluation to the page of features and the summary."""
    folder, tokens = tmp_path / "older", tmp_path / "tokens"
    tokenise(json_list(data_path, "--texts"), language_model.tokenizer, tokens)
    write_older_sae(folder)
    results, name = tmp_path / "results", "older"
    evaluation = results / f"evaluations/{name}.json"
    evaluate_ = script("evaluate")
    evaluate_.run(
        evaluate_.Job(folder, tokens, record, evaluation, tmp_path / "points",
                      evaluation=EvaluationConfig(max_windows=2))
    )  # fmt: skip
    figures = json.loads(evaluation.read_text())
    assert figures["model_name"] == "me/tiny" and figures["hook_spec"] == "blocks.1.hook_resid_post"
    files = [results / f"features/{name}.{kind_}" for kind_ in ("jsonl", "csv", "json", "html")]
    features = script("features")
    features.run(
        features.Job(folder, tokens, record, *files[:3],
                     features=FeaturesConfig(corpus_windows=4), load=LoadConfig())
    )  # fmt: skip
    corpus = json.loads(files[2].read_text())
    assert corpus["model_name"] == "me/tiny"
    assert figures["l0"] == pytest.approx(K, abs=0.01)
    assert corpus["l0"] == pytest.approx(K, abs=0.01)
    assert corpus["calibration"]["n_tokens"] == corpus["n_tokens"]
    rows = csv.DictReader(io.StringIO(files[1].read_text()))
    assert sum(float(row["density"]) for row in rows) == pytest.approx(K, abs=0.1)
    browse = script("browse")
    browse.browse(browse.Options(files[0], files[2], files[3]))
    assert "me/tiny" in files[3].read_text()
    (results / "saes").mkdir()
    shutil.copytree(folder, results / "saes" / name)
    (results / "runs.txt").write_text(f"{name}\n")
    summarise = script("summarise")
    outputs = [tmp_path / "out" / file for file in ("s.csv", "l.svg", "f.svg", "r.html")]
    summarise.summarise(summarise.Options(results / "runs.txt", results, *outputs))
    assert "me/tiny" in outputs[0].read_text() and "me/tiny" in outputs[3].read_text()
    plot = script("plot")
    svgs = tmp_path / "c.svg", tmp_path / "d.svg"
    plot.draw(plot.Options(evaluation, folder / "history.json", *svgs))
    assert all(svg.stat().st_size > 1000 for svg in svgs)
    (results / f"saes/{name}/history.json").unlink()
    run = read_run(evaluation, results / "saes" / name, files[2])
    assert run.history["epoch"] == [] and run.origin == {}
    summarise.summarise(summarise.Options(results / "runs.txt", results, *outputs))


# Export and publishing


def test_what_is_not_known_is_left_out_of_the_export(tmp_path: Path) -> None:
    write_older_sae(tmp_path / "older", "standard", "7")
    config = json.loads(saelens_files(load_sae(tmp_path / "older"))["cfg.json"])
    assert config["dtype"] == "float32" and config["architecture"] == "standard"
    assert config["metadata"] == {
        "sae_lens_version": "6.0.0",
        "hook_name": "blocks.7.hook_resid_post",
        "hook_head_index": None,
        "model_from_pretrained_kwargs": {},
    }


def test_the_importer_makes_a_whole_directory(folder: Path, kind: str, tmp_path: Path) -> None:
    output = tmp_path / "new"
    given = ["--threshold", "0.75"] if kind == "batch_topk" else []
    with pytest.raises(SystemExit, match="0"):
        import_sae.main([str(folder), str(output), "--model-name", "me/mine", *given])
    assert sorted(os.listdir(output)) == [
        "cfg.json", "config.json", "history.json", "sae_weights.safetensors", "weights.pt",
    ]  # fmt: skip
    sae, history = load_pretrained(output, with_history=True)
    expected = load_pretrained(folder, threshold=0.75 if given else None)
    assert torch.equal(sae.encode(X), expected.encode(X)) and history["loss"] == [1.5, 1.0]
    assert json.loads((output / "cfg.json").read_text())["metadata"]["model_name"] == "me/mine"
    theirs = load_file(output / "sae_weights.safetensors")
    pre = (X - theirs["b_dec"]) @ theirs["W_enc"] + theirs["b_enc"]
    kept = pre > theirs.get("threshold", torch.zeros(()))
    torch.testing.assert_close(pre * kept, expected.encode(X), rtol=1e-4, atol=1e-4)


def test_the_importer_asks_for_a_threshold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_older_sae(tmp_path / "older")
    with pytest.raises(SystemExit, match="1"):
        import_sae.main([str(tmp_path / "older"), str(tmp_path / "new")])
    assert "error: --threshold: the SAE in" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_it_is_published_as_it_is(
    folder: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = RepoConfig(hf_repo_id="alice/saes")
    evaluation = tmp_path / "evaluation.json"
    figures: dict[str, Any] = {"l0": 5.0}
    if kind == "batch_topk":
        figures["calibration"] = {"threshold": 0.75, "n_tokens": 9}
    evaluation.write_text(json.dumps(figures))
    with hub_here(tmp_path, monkeypatch) as server:
        marker = hub.upload(folder, evaluation, repo)
        assert hub.verify(marker) == []
        files = server.files("alice/saes")
        assert sorted(name for name in files if name.startswith("older/")) == [
            "older/README.md", "older/config.json", "older/evaluation.json", "older/history.json",
            "older/weights.pt",
        ]  # fmt: skip
        card = files["older/README.md"].decode()
        assert "an unnamed language model" in card and "from sae_lens" not in card
        assert ("threshold=0.75" in card) == (kind == "batch_topk")
        sae = load_pretrained("alice/saes/older")
        assert torch.equal(sae.W_enc, load_sae(folder).W_enc)
        (folder / "history.json").unlink()
        assert "older/history.json" not in hub.upload(folder, None, repo).files
        (folder / "weights.pt").unlink()
        with pytest.raises(SAEError, match="no weights.pt"):
            hub.upload(folder, None, repo)
