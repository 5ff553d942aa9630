"""What is wrong with files is said before a job runs; what editors leave behind is no chapter."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running import ROOT

from sae_core.data_processing.textbook_process import ProcessConfig, process
from sae_core.models.model_sources import ModelRecord
from sae_core.utils.errors import SAEError
from sae_core.workflow import config_schema
from sae_core.workflow.preflight import check_excluded_tokens, check_inputs
from sae_core.workflow.workflow_config import Plan, load_plan

PROSE = "The chapter has a sentence of some ten words in it.\n"


@pytest.fixture
def physics(tmp_path: Path) -> Path:
    """A folder with one chapter."""
    folder = tmp_path / "physics"
    folder.mkdir()
    (folder / "one.md").write_text(PROSE)
    return folder


@pytest.fixture
def plan(tmp_path: Path, physics: Path) -> Callable[..., Plan]:
    """A plan for that folder and a local model, with changes of the model's entry."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")

    def plan(folders: dict[str, Path] | None = None, **entry: Any) -> Plan:
        names = {key: str(folder) for key, folder in (folders or {"physics": physics}).items()}
        source = {"path": str(model)}
        config = {
            "chapters": {"folders": names},
            "models": [{"name": "m", "source": source, "layers": [1], **entry}],
        }
        return load_plan(config, ROOT / "workflow/schemas/config.schema.yaml")

    return plan


def record(folder: Path) -> Callable[[str], Path]:
    """Where the record of a fetched model is: `folder`."""
    return lambda name: folder / f"{name}.json"


def write_record(folder: Path, path: Path) -> None:
    facts = {"name": "m", "source": "local directory", "commit": None, "path": str(path)}
    facts |= {"n_layers": 4, "d_model": 8, "hook_names": ["hook_resid_post", "hook_mlp_out"]}
    facts |= {"context_length": 512}
    (folder / "m.json").write_text(json.dumps(facts))


def test_what_is_there_passes(plan: Callable[..., Plan], tmp_path: Path) -> None:
    check_inputs(plan(), record(tmp_path))
    write_record(tmp_path, tmp_path / "model")
    check_inputs(plan(layers=[3, "middle"], hook_name="hook_mlp_out"), record(tmp_path))
    check_inputs(plan({"a{b}": tmp_path / "physics"}), record(tmp_path))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"layers": [0, 4]}, "models: m: layers: 4: the model's layers are 0 to 3"),
        ({"max_text_length": 513}, "models: m: max_text_length: 513: the model reads at most 512"),
        ({"hook_name": "hook_resid_mid"}, "models: m: hook_name: hook_resid_mid: this model has"),
        (
            {"hook_name": "mlp.hook_in", "target_hook_name": "hook_mlp_out"},
            "models: m: hook_name: mlp.hook_in",
        ),
    ],
)
def test_a_model_that_is_known_has_what_is_asked(
    plan: Callable[..., Plan], tmp_path: Path, entry: dict[str, Any], message: str
) -> None:
    write_record(tmp_path, tmp_path / "model")
    with pytest.raises(SAEError, match=f"^config: {message}"):
        check_inputs(plan(**entry), record(tmp_path))
    write_record(tmp_path, tmp_path / "an earlier one")
    check_inputs(plan(**entry), record(tmp_path))


def test_tokens_to_leave_out_are_in_the_vocabulary(
    plan: Callable[..., Plan], tmp_path: Path, tiny_model: Path
) -> None:
    source = {"path": str(tiny_model)}
    write_record(tmp_path, tiny_model)
    check_inputs(plan(source=source, excluded_tokens=["<|endoftext|>"]), record(tmp_path))
    wrong = plan(source=source, excluded_tokens=["<|endoftext|>", "<|nothing|>"])
    message = r"^config: models: m: excluded_tokens: <\|nothing\|>: .* special tokens are <\|endoft"
    with pytest.raises(SAEError, match=message):
        check_inputs(wrong, record(tmp_path))
    write_record(tmp_path, tmp_path / "on another machine")
    fetched = ModelRecord.load(tmp_path / "m.json")
    check_excluded_tokens(wrong.models["m"], fetched)


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, None])
def test_a_local_model_is_there(
    plan: Callable[..., Plan], tmp_path: Path, make: Callable[[Path], None] | None
) -> None:
    if make:
        make(tmp_path / "other")
    wrong = plan(source={"path": str(tmp_path / "other")})
    with pytest.raises(SAEError, match="models: m: source.path: .*other: (no such|contains no)"):
        check_inputs(wrong, record(tmp_path))
    write_record(tmp_path, tmp_path / "other")
    check_inputs(wrong, record(tmp_path))


def empty(folder: Path) -> None:
    (folder / "one.md").unlink()


def remove(folder: Path) -> None:
    empty(folder)
    folder.rmdir()


def nest(folder: Path) -> None:
    (folder / "part").mkdir()
    (folder / "one.md").rename(folder / "part/one.md")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove, "physics: no such folder"),
        (empty, "physics: contains no .md file"),
        (nest, "physics: the .md files are in its subfolders, such as .*physics/part"),
        (lambda f: (f / "{x}.md").touch(), r"the braces in .*physics/\{x\}.md"),
        (lambda f: (f / "two.md").symlink_to("nothing"), "two.md is a link to a file that is not"),
        (lambda f: Path(os.fsdecode(bytes(f) + b"/\xe9.md")).touch(), r"udce9.md' is not UTF-8"),
    ],
)
def test_chapters_are_there_and_can_be_named(
    plan: Callable[..., Plan], tmp_path: Path, physics: Path, spoil: Any, message: str
) -> None:
    spoil(physics)
    with pytest.raises(SAEError, match=f"^config: chapters.folders.physics: .*{message}"):
        check_inputs(plan(), record(tmp_path))
    if "braces" not in message:
        config = ProcessConfig(folders=(physics,), output=tmp_path / "texts.json")
        with pytest.raises(SAEError, match=f"^--folders .*{message}"):
            process(config)
        assert not list(tmp_path.glob("texts*"))


def test_a_folder_is_of_one_subject(plan: Callable[..., Plan], physics: Path) -> None:
    with pytest.raises(SAEError, match="folders.chemistry: .*also the folder of physics"):
        check_inputs(plan({"physics": physics, "chemistry": physics}), record(physics))


def test_what_editors_and_systems_leave_is_no_chapter(
    plan: Callable[..., Plan], tmp_path: Path, physics: Path
) -> None:
    (physics / ".#one.md").symlink_to("user@host.1234:5678")
    (physics / "old.md").mkdir()
    for name in ("._one.md", ".one.md", "~$one.md", "#one.md#", "one.md~", ".one.md.swp"):
        (physics / name).write_bytes(b"\x00\x05\x16\x07\xff")
    check_inputs(plan(), record(tmp_path))
    assert plan().chapters() == [physics / "one.md"]
    report = process(ProcessConfig(folders=(physics,), output=tmp_path / "texts.json"))
    assert report.chapters == [physics / "one.md"]


def test_names_that_the_locale_cannot_write_are_refused(
    plan: Callable[..., Plan], physics: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config_schema.sys, "getfilesystemencoding", lambda: "iso8859-9")
    assert plan().process.folders == (physics,)
    with pytest.raises(SAEError, match=r"models\[0\].name: 'mod\\xe8le' needs UTF-8.*LC_ALL"):
        plan(name="modèle")


def test_a_command_reads_names_as_utf8_whatever_the_locale_is(tmp_path: Path) -> None:
    """Python without UTF-8 mode in the plain C locale takes names for ASCII."""
    folder = tmp_path / "模型"
    folder.mkdir()
    (folder / "é.md").write_text(PROSE)
    command = [sys.executable, ROOT / "sae_core/data_processing/textbook_process.py"]
    command += ["--folders", folder, "--output", tmp_path / "texts.json"]
    locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run(command, capture_output=True, env={**os.environ, **locale}, timeout=60)
    assert done.returncode == 0, done.stderr
    sources = json.loads((tmp_path / "texts.sources.json").read_text(encoding="utf-8"))
    assert sources["chapters"][0]["file"] == "模型/é.md"
    latin = [*command[:3], os.fsencode(tmp_path) + b"/\xe9", *command[4:]]
    done = subprocess.run(latin, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "not UTF-8; rename" in done.stderr


def test_an_sae_to_begin_with_that_is_nowhere(plan: Callable[..., Plan], tmp_path: Path) -> None:
    with pytest.raises(SAEError, match="init_from.*'nowhere': no such SAE directory"):
        check_inputs(plan(saes=[{"init_from": "nowhere"}]), record(tmp_path))
    check_inputs(plan(saes=[{"init_from": "owner/repository/run@main"}]), record(tmp_path))
