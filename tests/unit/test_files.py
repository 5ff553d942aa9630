"""Files that are written whole or not at all, and what killed writers leave behind."""

import errno
import fcntl
import os
import stat
from pathlib import Path

import pytest

from sae_core.trainer.resume import SavedStates
from sae_core.utils import files
from sae_core.utils.errors import SAEError
from sae_core.utils.files import new_folder, sync, write_file


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done, in order: names of what was synced, with `/` behind a folder's."""
    done: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        done.append(f"{path.name}/" if path.is_dir() else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    return done


@pytest.mark.parametrize("name", ["texts.json", "a [b]*?.json", "x" * 180])
def test_what_a_killed_writer_left_is_deleted_by_the_next(name: str, tmp_path: Path) -> None:
    for leftover in (f".{name}.12345.tmp", f".{name}.0a1b2c3d.tmp"):
        (tmp_path / leftover).write_text("half")
    (tmp_path / ".other.json.12345.tmp").write_text("of another file")
    write_file(tmp_path / name, "whole")
    assert names(tmp_path) == [".other.json.12345.tmp", name]


def test_what_a_living_writer_has_open_stays(tmp_path: Path) -> None:
    path = tmp_path / "texts.json"
    with files._temporary(path) as (file, temporary):
        file.write(b"first")
        write_file(path, "second")
        assert temporary.exists() and path.read_text() == "second"
        file.flush()
        temporary.replace(path)
    assert path.read_text() == "first" and names(tmp_path) == ["texts.json"]


def test_without_locks_files_are_written_and_leftovers_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    (tmp_path / ".x.1.tmp").touch()
    write_file(tmp_path / "x", "whole")
    assert (tmp_path / "x").read_text() == "whole" and names(tmp_path) == [".x.1.tmp", "x"]


def test_the_folder_is_synced_after_a_rename(tmp_path: Path, synced: list[str]) -> None:
    write_file(tmp_path / "folder/file", "text")
    assert synced == ["file", "folder/"]
    synced.clear()
    with new_folder(tmp_path / "saes/one") as staging:
        (staging / "file").touch()
    assert synced == [".one.writing/", "saes/"]
    synced.clear()
    (tmp_path / "saes/one").rename(tmp_path / "saes/.one.replaced")
    files.bring_back(tmp_path / "saes/one")
    assert synced == ["saes/"] and (tmp_path / "saes/one/file").exists()
    synced.clear()
    (tmp_path / "points/resume").mkdir(parents=True)
    SavedStates(tmp_path / "points/resume", {}).set_aside("is of another training")
    assert synced == ["points/"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_without_a_sync_of_folders_will_do(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But a disk that fails is an error, and so is a file that cannot be synced."""
    fsync = os.fsync

    def fails(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fails)
    if code == errno.EIO:
        with pytest.raises(SAEError, match="cannot be written"):
            write_file(tmp_path / "x", "text")
        return
    write_file(tmp_path / "x", "text")
    with new_folder(tmp_path / "folder") as staging:
        (staging / "file").touch()
    assert names(tmp_path) == ["folder", "x"]
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(code, "no")))
    with pytest.raises(OSError):
        sync(tmp_path / "x")


def test_write_file_makes_the_folder_and_names_what_it_cannot_write(tmp_path):
    write_file(tmp_path / "new" / "a.txt", "text")
    assert (tmp_path / "new" / "a.txt").read_text() == "text"
    with pytest.raises(SAEError, match="a.txt/b.txt: cannot be written"):
        write_file(tmp_path / "new" / "a.txt" / "b.txt", "text")
