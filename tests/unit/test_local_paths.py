"""A model in a local directory: what it is called, and that its path stays on this machine."""

import base64
import json
import os
import shutil
from pathlib import Path

import pytest
from published import METADATA, hub_here, make_sae_directory
from synthetic import random_sae

from sae_core.evaluation.identity import identity
from sae_core.formats.checkpoint import sae_files
from sae_core.formats.saelens import saelens_files
from sae_core.model_training.eval_sae_minibatch import Minibatch, measure
from sae_core.model_training.one_run import _resolved
from sae_core.model_training.Qwen3_all_sae_training import PLANS, BatchConfig, train_all
from sae_core.models.model_sources import FetchConfig, SourceConfig, fetch, model_of, model_sha256
from sae_core.publishing import hub
from sae_core.publishing.model_card import SAEFacts
from sae_core.sae.config import SAESpec
from sae_core.sae_train import train_from_model
from sae_core.settings.services import RepoConfig
from sae_core.settings.texts import TextsConfig
from sae_core.train_config import ModelConfig, RunConfig
from sae_core.training import Observer
from sae_core.utils.cli import parse
from sae_core.utils.errors import SAEError
from sae_core.utils.naming import own_name, without_paths

PLANTED = "home_of_somebody"
REPO = RepoConfig(hf_repo_id="alice/saes")
HASH = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A model under a path that nobody else is to read."""
    folder = tmp_path_factory.mktemp(PLANTED) / "llama-7"
    shutil.copytree(tiny_model, folder)
    return folder


def train(model: Path, folder: Path, texts: list[str], *options: str) -> Path:
    data = folder / "texts.json"
    data.write_text(json.dumps(texts))
    base = (
        f"--model-name {model} --data-path {data} --output-root {folder / 'saes'} --device cpu "
        f"--checkpoint-root {folder / 'points'} --num-epochs 1 --max-text-length 32 --topk 4 "
        "--tokens-per-step 256 --sae-expansion 2 --val-fraction 0.2 --no-use-end-to-end"
    ).split()
    return train_from_model(parse(RunConfig, "", [*base, *options]), Observer())


@pytest.fixture(scope="module")
def sae(model: Path, tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    return train(model, tmp_path_factory.mktemp(PLANTED), texts)


def holds(content: bytes) -> bool:
    """Whether the planted name is in it, as it is or in base64 at any offset."""
    forms = [PLANTED.encode()]
    for pad in range(3):
        forms.append(base64.b64encode(b"x" * pad + PLANTED.encode())[4:-4])
    return any(form in content for form in forms)


def test_a_directory_has_a_name_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "models" / "llama"
    (there / "inside").mkdir(parents=True)
    snapshot = tmp_path / f"hub/models--Qwen--Qwen3-0.6B/snapshots/{HASH}"
    for folder in (snapshot, tmp_path / ".hidden", tmp_path / "Qwen/Qwen3-4B"):
        folder.mkdir(parents=True)
    (tmp_path / "current").symlink_to(there)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(there)
    assert [own_name(name) for name in (".", "./", "inside/..", "../llama", f"{there}//")] == (
        ["llama"] * 5
    )
    assert own_name("inside") == "inside" and own_name("..") == "models"
    assert own_name("~/models/llama/") == "llama" and own_name("~/current") == "current"
    assert own_name(str(snapshot)) == own_name(f"{snapshot}/") == "Qwen/Qwen3-0.6B"
    assert own_name(str(tmp_path / ".hidden")) == "hidden" and own_name("/") == "model"
    monkeypatch.chdir(tmp_path)
    assert own_name("Qwen/Qwen3-4B") == "Qwen3-4B", "a directory, as the model is loaded from it"
    assert own_name("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B", "on the Hub"
    assert ModelConfig(model_name=str(there), model_id="meta/llama").name == "meta/llama"


@pytest.mark.parametrize("name", ["/models/llama", "~/llama", "./llama", "..", "C:\\llama", "-x"])
def test_a_path_is_no_name(name: str) -> None:
    with pytest.raises(SAEError, match="--model-id"):
        ModelConfig(model_id=name)


def test_values_without_paths() -> None:
    given = {
        "a": f"/{PLANTED}/x/llama/", "b": ["~/data.json", 1.5, None, True], "c": "a/b", "d": "x",
        "e": f"C:\\{PLANTED}\\llama", "f": f"../{PLANTED}.json", "g": "gpt2", "h": "n ~ 3 / 4",
    }  # fmt: skip
    assert without_paths(given, {"x": "y"}) == {
        "a": "llama", "b": ["data.json", 1.5, None, True], "c": "a/b", "d": "y",
        "e": "llama", "f": f"{PLANTED}.json", "g": "gpt2", "h": "n ~ 3 / 4",
    }  # fmt: skip


def test_a_training_on_a_directory_tells_its_path_to_nobody(
    sae: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sae.name == "llama-7.blocks.1.hook_resid_post.btop4sae.exp2"
    files = [path for path in sae.rglob("*") if path.is_file()]
    assert len(files) == 5 and not [path for path in files if holds(path.read_bytes())]
    metadata = json.loads((sae / "config.json").read_text())["metadata"]
    assert metadata["model_name"] == "llama-7" and metadata["model_commit"] is None
    assert metadata["model_sha256"] == model_sha256(model)
    evaluation = tmp_path / "evaluation.json"
    figures = identity(sae.name, SAESpec.load(sae / "config.json"))
    evaluation.write_text(json.dumps(figures))
    with hub_here(tmp_path, monkeypatch, xet=False) as server:
        hub.upload(sae, evaluation, REPO)
        sent = b"".join(server.received)
        held = server.files("alice/saes")
    assert b"llama-7" in sent and not holds(sent) and not any(map(holds, held.values()))
    assert f"{sae.name}/weights.pt" in held and b"base_model" not in held["README.md"]


def test_no_way_of_writing_an_sae_writes_a_path(tmp_path: Path) -> None:
    """As one that is imported, whose makers may have recorded theirs."""
    origin = METADATA | {"model_name": f"/{PLANTED}/llama", "data_file": f"~/{PLANTED}/texts.json"}
    sae = random_sae(metadata=origin)
    files = sae_files(sae, {}) | saelens_files(sae)
    assert not any(map(holds, files.values()))
    config, cfg = (json.loads(files[name])["metadata"] for name in ("config.json", "cfg.json"))
    assert config["model_name"] == cfg["model_name"] == "llama"
    assert config["data_file"] == cfg["dataset_path"] == "texts.json"


def test_w_and_b_is_told_no_path_of_the_model(model: Path) -> None:
    config = parse(RunConfig, "", ["--model-name", str(model)])
    assert _resolved(config, 1)["model"]["model_name"] == "llama-7"


@pytest.mark.parametrize("given", [f"/{PLANTED}/llama", f"out/{PLANTED}/llama"])
def test_a_directory_from_before_is_published_without_its_path(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rest = "blocks.1.hook_resid_post.btop3sae.exp4"
    made = make_sae_directory(tmp_path / f"{given.replace('/', '_')}.{rest}")
    for name in ("config.json", "cfg.json"):
        path = made.folder / name
        content = json.loads(path.read_text())
        content["metadata"]["model_name"] = given
        if name == "cfg.json":
            content["metadata"]["dataset_path"] = f"/{PLANTED}/texts.json"
        path.write_text(json.dumps(content))
    figures = json.loads(made.evaluation.read_text())
    made.evaluation.write_text(json.dumps(figures | {"model_name": given}))
    with hub_here(tmp_path, monkeypatch, xet=False) as server:
        marker = hub.upload(made.folder, made.evaluation, REPO)
        assert hub.verify(marker) == []
        sent, held = b"".join(server.received), server.files("alice/saes")
    assert marker.run_name == f"llama.{rest}" and f"llama.{rest}/weights.pt" in held
    assert not holds(sent) and not any(map(holds, held.values()))
    config = json.loads(held[f"llama.{rest}/config.json"])
    assert config["metadata"]["model_name"] == "llama"
    assert json.loads(held[f"llama.{rest}/evaluation.json"])["run_name"] == f"llama.{rest}"
    assert f"[llama.{rest}](./llama.{rest}) | llama |" in held["README.md"].decode()


def test_what_holds_no_path_is_sent_as_it_is(tmp_path: Path) -> None:
    made = make_sae_directory(tmp_path / "run")
    facts = SAEFacts.read(made.folder, made.evaluation, REPO)
    files = hub.run_files(made.folder, made.evaluation, facts)
    assert [name for name, content in files.items() if isinstance(content, bytes)] == (
        ["run/README.md"]
    )


def test_an_evaluation_finds_the_model_where_it_is_told_to(
    sae: Path, model: Path, tmp_path: Path
) -> None:
    def config(**options: str) -> Minibatch:
        data = sae.parents[1] / "texts.json"
        texts = TextsConfig(data_path=data)
        return Minibatch((sae,), texts=texts, num_windows=2, device="cpu", **options)

    with pytest.raises(SAEError, match="--model-name: .* llama-7, was a directory"):
        measure(config())
    moved = tmp_path / "elsewhere"
    shutil.copytree(model, moved)
    [figures] = measure(config(model_name=str(moved)))
    assert figures["model_name"] == "llama-7" and figures["n_windows"] == 2
    weights = moved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(SAEError, match="not the language model that .* was trained on"):
        measure(config(model_name=str(moved)))


def test_which_model_saes_are_of() -> None:
    def spec(**origin: str) -> SAESpec:
        return SAESpec(1, 1, 0.0, "", "", 0, "", "", 1, 1, 1, 0.0, metadata=origin)

    same = [spec(model_name="Qwen/Qwen3-0.6B"), spec(model_name="qwen/qwen3-0.6b")]
    assert model_of(same, None) == "Qwen/Qwen3-0.6B"
    assert model_of([spec(), spec(model_name="a/b")], "a/b") == "a/b"
    for other in (spec(), spec(model_name="Qwen/Qwen3-4B")):
        with pytest.raises(SAEError, match="no.* one common language model"):
            model_of([*same, other], None)


def test_the_identity_of_a_model_is_that_of_what_it_computes(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    os.utime(copy / "config.json", (0, 0))
    (copy / "README.md").write_text("notes")
    (copy / "trainer_state.json").write_text("{}")
    assert model_sha256(copy) == model_sha256(model)
    for name in ("config.json", "tokenizer.json"):
        before = (copy / name).read_text()
        (copy / name).write_text(before + " ")
        assert model_sha256(copy) != model_sha256(model)
        (copy / name).write_text(before)
    record = fetch(FetchConfig("a name", source=SourceConfig(path=copy)))
    assert record.model_sha256 == model_sha256(model) and record.name == "a name"


def test_two_directories_of_one_name_are_not_trained_into_one_folder(tmp_path: Path) -> None:
    for place in ("a", "b"):
        (tmp_path / place / "llama").mkdir(parents=True)
    models = [str(tmp_path / "a/llama"), str(tmp_path / "b/llama")]
    with pytest.raises(SAEError, match="the same name, llama"):
        train_all(parse(BatchConfig, "", ["--models", *models]))


def test_what_fits_a_gpu_is_known_of_a_model_in_any_case() -> None:
    run = parse(BatchConfig, "", []).run("qwen/QWEN3-32b")
    plan = PLANS["Qwen/Qwen3-32B"]
    assert (run.runtime.batch_size, run.data.max_text_length) == plan
