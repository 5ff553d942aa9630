"""SAE directories: what is read back, what an old one needs, what a damaged one is answered."""

import copy
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import KINDS, OLD_KEYS, normal, random_sae

from sae_core.formats.checkpoint import load_history, load_sae, sae_files, save_sae, write_files
from sae_core.sae.config import SAESpec
from sae_core.sae.kinds import KINDS as REGISTRY
from sae_core.utils.errors import SAEError

HISTORY = {"loss": [1.5, 0.25], "dead_features": [0, 3]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole SAE directory."""
    save_sae(tmp_path / "sae", random_sae(dtype=torch.float32), HISTORY)
    return tmp_path / "sae"


def change_tensors(folder: Path, **changes: Any) -> None:
    """Replace tensors of `weights.pt`; None removes one."""
    stored = torch.load(folder / "weights.pt", weights_only=True) | changes
    torch.save({name: t for name, t in stored.items() if t is not None}, folder / "weights.pt")


def change_config(folder: Path, **changes: Any) -> None:
    """Replace keys of `config.json`; None removes one."""
    stored = json.loads((folder / "config.json").read_text()) | changes
    stored = {key: value for key, value in stored.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(stored))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_loads_what_it_saved(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    sae = random_sae(kind, dtype, metadata={"model_name": "a/b", "nested": {"tokens": 7}})
    sae.record_activity(torch.arange(20) % 3 == 0)
    save_sae(tmp_path / "sae", sae, HISTORY)
    loaded = load_sae(tmp_path / "sae")
    assert type(loaded) is REGISTRY[kind] and loaded.spec == sae.spec
    assert loaded.state_dict().keys() == sae.state_dict().keys()
    for name, tensor in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
        assert loaded.state_dict()[name].dtype == tensor.dtype, name
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training
    assert load_history(tmp_path / "sae") == HISTORY
    assert set(contents(tmp_path / "sae")) == {"weights.pt", "config.json", "history.json"}


def test_same_sae_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_sae(tmp_path / name, random_sae(), HISTORY)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    save_sae(tmp_path / "c", load_sae(tmp_path / "a"), HISTORY)
    assert contents(tmp_path / "c") == contents(tmp_path / "a")


@pytest.mark.parametrize("missing", [(), ("ever_fired",), ("ever_fired", "num_batches_not_active")])
@pytest.mark.parametrize(("top_k", "kind"), [(3, "batch_topk"), (0, "standard")])
def test_old_form_loads(top_k: int, kind: str, missing: tuple[str, ...], tmp_path: Path) -> None:
    """Twelve keys, and no `sae_type`: SAEs were published like this."""
    sae, x = random_sae(kind, torch.float32), normal(9, 6, dtype=torch.float32)
    sae.ever_fired[:3] = True
    stored = {name: t.detach().clone() for name, t in sae.state_dict().items()}
    tmp_path.joinpath("config.json").write_text(json.dumps({**OLD_KEYS, "top_k": top_k}))
    torch.save({n: t for n, t in stored.items() if n not in missing}, tmp_path / "weights.pt")
    loaded = load_sae(tmp_path)
    assert type(loaded) is REGISTRY[kind] and loaded.spec.sae_type == kind
    torch.testing.assert_close(loaded(x), sae(x))
    assert loaded.ever_fired.sum() == (0 if "ever_fired" in missing else 3)
    assert loaded.num_batches_not_active.sum() == 0
    assert loaded.W_enc.T.is_contiguous()


def test_keys_of_a_later_version_are_left_out(folder: Path) -> None:
    change_config(folder, colour="blue")
    assert not hasattr(load_sae(folder).spec, "colour")


class Evil:
    """Unpickled, it makes a file."""

    marker = ""

    def __reduce__(self) -> tuple[Callable, tuple[str, int]]:
        return os.mkdir, (self.marker, 0o700)


def cut(folder: Path, name: str, share: float) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(len(content) * share)])


FAULTS: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    # what is done to the directory, the file that is named, what is said of it
    "no weights": (lambda f: (f / "weights.pt").unlink(), "weights.pt", "no such file"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json", "not a readable"),
    "no tensor": (lambda f: change_tensors(f, b_dec=None), "weights.pt", "no tensor b_dec"),
    "no threshold": (lambda f: change_tensors(f, threshold=None), "weights.pt", "threshold"),
    "half": (lambda f: cut(f, "weights.pt", 0.5), "weights.pt", "not a readable file of tensors"),
    "nearly all": (lambda f: cut(f, "weights.pt", 0.99), "weights.pt", "not a readable file"),
    "empty": (lambda f: cut(f, "weights.pt", 0), "weights.pt", "not a readable file"),
    "text": (lambda f: (f / "weights.pt").write_text("hello"), "weights.pt", "not a readable"),
    "garbage": (lambda f: (f / "weights.pt").write_bytes(b"."), "weights.pt", "not a readable"),
    "folder": (
        lambda f: ((f / "weights.pt").unlink(), (f / "weights.pt").mkdir()),
        "weights.pt",
        "not a readable",
    ),
    "shape": (
        lambda f: change_tensors(f, W_enc=torch.zeros(20, 6)),
        "weights.pt",
        r"W_enc has shape \(20, 6\), but config.json says \(6, 20\)",
    ),
    "NaN": (lambda f: change_tensors(f, b_enc=torch.full((20,), torch.nan)), "weights.pt", "NaN"),
    "list": (lambda f: torch.save([1], f / "weights.pt"), "weights.pt", "other than named tensors"),
    "number": (lambda f: change_tensors(f, W_dec=3), "weights.pt", "other than named tensors"),
    "integers": (
        lambda f: change_tensors(f, W_dec=torch.ones(20, 6, dtype=torch.long)),
        "weights.pt",
        "W_dec",
    ),
    "no key": (lambda f: change_config(f, d_sae=None, top_k=None), "config.json", "d_sae, top_k"),
    "cut config": (lambda f: cut(f, "config.json", 0.5), "config.json", "not a readable"),
    "list config": (lambda f: (f / "config.json").write_text("[]"), "config.json", "missing"),
    "unknown kind": (lambda f: change_config(f, sae_type="magic"), "config.json", "magic"),
    "type": (lambda f: change_config(f, d_in="six"), "config.json", "d_in"),
    "negative": (lambda f: change_config(f, d_sae=-20), "config.json", "d_sae"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_directory(fault: str, folder: Path) -> None:
    damage, name, says = FAULTS[fault]
    damage(folder)
    with pytest.raises(SAEError, match=says) as error:
        load_sae(folder)
    assert str(error.value).startswith(f"{folder / name}: ")
    assert "\n" not in str(error.value)


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(SAEError, match="nowhere: no such SAE directory"):
        load_sae(tmp_path / "nowhere")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o))])
def test_code_in_a_pickle_is_not_run(write: Callable[[Any, Path], Any], folder: Path) -> None:
    evil = Evil()
    evil.marker = str(folder / "marker")
    write({"W_enc": evil}, folder / "weights.pt")
    with pytest.raises(SAEError, match="weights.pt: not a readable file of tensors"):
        load_sae(folder)
    assert not (folder / "marker").exists()


@pytest.mark.parametrize("content", [None, '{"loss": [1.0', b"\xff"])
def test_damaged_history(content: str | bytes | None, folder: Path) -> None:
    (folder / "history.json").unlink()
    if content is not None:
        raw = content if isinstance(content, bytes) else content.encode()
        (folder / "history.json").write_bytes(raw)
    with pytest.raises(SAEError, match="history.json: not a readable training history"):
        load_history(folder)


def test_configuration_is_read_back(tmp_path: Path) -> None:
    spec = random_sae(metadata={"seed": 1}).spec
    (tmp_path / "config.json").write_text(spec.to_json())
    assert SAESpec.load(tmp_path / "config.json") == spec
    assert set(OLD_KEYS) < set(json.loads(spec.to_json()))


@pytest.mark.parametrize("kind", ["compressed", "entries that share their bytes"])
def test_an_archive_that_unpacks_to_more_is_not_unpacked(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "weights.pt"
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    if kind == "compressed":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content + bytes(10**6))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data/0", bytes(10**6))
            for number in range(1, 9):
                again = copy.copy(archive.infolist()[0])
                again.filename = f"archive/data/{number}"
                archive.filelist.append(again)
    assert path.stat().st_size < 2 * 10**6
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpacked"))
    with pytest.raises(SAEError, match="weights.pt: unpacks to [0-9,]{9,} bytes from"):
        load_sae(folder)


@pytest.mark.parametrize("size", [10**9, 2**62])
def test_sizes_are_compared_before_anything_is_made(size: int, folder: Path) -> None:
    change_config(folder, d_in=size, d_sae=size)
    with pytest.raises(SAEError, match=r"W_dec has shape \(20, 6\), but config.json says"):
        load_sae(folder)


# Writing


def test_directory_is_replaced_whole(folder: Path) -> None:
    write_files(folder, {"other.txt": b"new"})
    assert contents(folder) == {"other.txt": b"new"}
    assert list(folder.parent.iterdir()) == [folder]


def test_leftovers_of_a_killed_write_do_no_harm(folder: Path) -> None:
    for name in (".sae.writing", ".sae.replaced"):
        (folder.parent / name / "deep").mkdir(parents=True)
    write_files(folder, {"other.txt": b"new"})
    assert contents(folder) == {"other.txt": b"new"}
    assert list(folder.parent.iterdir()) == [folder]


def fail(*_: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.mkdir", "pathlib.Path.rename"])
def test_failed_write_leaves_the_earlier_directory(
    call: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(folder)
    monkeypatch.setattr(call, fail if call == "os.fsync" else lambda *_, **__: fail())
    with pytest.raises(SAEError, match=r"sae: cannot be written \(No space left on device\)"):
        save_sae(folder, random_sae(seed=1), {})
    monkeypatch.undo()
    assert contents(folder) == before
    assert list(folder.parent.iterdir()) == [folder]


def test_failure_at_the_last_moment_brings_the_earlier_directory_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, rename = contents(folder), Path.rename

    def second_fails(path: Path, target: Path) -> Path:
        return fail() if path.name.endswith(".writing") else rename(path, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(SAEError, match="cannot be written"):
        save_sae(folder, random_sae(seed=1), {})
    assert folder.is_dir() and contents(folder) == before


def test_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    with pytest.raises(SAEError, match="file/sae: cannot be written .*choose another folder"):
        write_files(tmp_path / "file" / "sae", sae_files(random_sae(), {}))
    assert (tmp_path / "file").read_text() == "here"
