"""Uploads by the unmodified client to a Hub on this machine."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from minihub import MiniHub
from published import NAME, REPO, Made, commits, environment, make_sae_directory
from running import ROOT, Run

from sae_core import list_pretrained, load_pretrained
from sae_core.publishing import access, hub
from sae_core.settings.services import RepoConfig
from sae_core.utils.errors import SAEError

pytestmark = pytest.mark.usefixtures("no_waiting")


def test_one_commit_brings_everything(both: MiniHub, made: Made) -> None:
    marker = hub.upload(made.folder, made.evaluation, REPO)
    files = both.files("alice/saes")
    names = {"weights.pt", "config.json", "history.json", "cfg.json", "sae_weights.safetensors"}
    expected = {f"{NAME}/{name}" for name in names | {"evaluation.json", "README.md"}}
    assert set(files) == expected | {"README.md", ".gitattributes"}
    assert commits(both) == 2, "the initial one, and the upload"
    assert marker.files == {p: hashlib.sha256(files[p]).hexdigest() for p in expected}
    assert marker.commit == both.repositories["alice/saes"].head
    assert files[f"{NAME}/weights.pt"] == (made.folder / "weights.pt").read_bytes()
    assert not both.repositories["alice/saes"].private
    assert hub.verify(marker) == []


def test_an_unchanged_sae_uploads_nothing_again(both: MiniHub, made: Made) -> None:
    first = hub.upload(made.folder, made.evaluation, REPO)
    both.requests.clear()
    again = hub.upload(made.folder, made.evaluation, REPO)
    assert (again.commit, again.files) == (first.commit, first.files)
    assert commits(both) == 2
    sent = [r for r in both.requests if r.method in ("POST", "PUT")]
    assert [r.path.split("/")[5] for r in sent] == ["paths-info"], "a question, not an upload"


def test_only_what_changed_is_sent(server: MiniHub, made: Made) -> None:
    hub.upload(made.folder, made.evaluation, REPO)
    server.requests.clear()
    made.evaluation.write_text(made.evaluation.read_text().replace("0.125", "0.25"))
    marker = hub.upload(made.folder, made.evaluation, REPO)
    assert commits(server) == 3 and not [r for r in server.requests if "_lfs" in r.path]
    assert b"0.25" in server.files("alice/saes")[f"{NAME}/evaluation.json"]
    assert hub.verify(marker) == []


def test_a_private_repository_is_made_private(server: MiniHub, made: Made) -> None:
    private = RepoConfig(hf_repo_id="alice/saes", hf_private=True)
    hub.upload(made.folder, None, private)
    assert server.repositories["alice/saes"].private
    access.check_access(private)
    server.repositories["alice/saes"].private = False
    with pytest.raises(SAEError, match="alice/saes exists and is public"):
        access.check_access(private)


@pytest.mark.parametrize("when", ["before", "between", "unchanged"])
def test_a_private_upload_never_lands_in_a_public_repository(
    when: str, server: MiniHub, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it was public all along, or became so while the large files were on their way."""
    private = RepoConfig(hf_repo_id="alice/saes", hf_private=True)
    hub.upload(made.folder, None, private)
    repository, n_commits = server.repositories["alice/saes"], commits(server)
    preupload = access.HfApi.preupload_lfs_files

    def becomes_public(*args: object, **options: object) -> None:
        preupload(*args, **options)
        repository.private = False

    if when == "between":
        monkeypatch.setattr(access.HfApi, "preupload_lfs_files", becomes_public)
    else:
        repository.private = False
    evaluation = None if when == "unchanged" else made.evaluation
    with pytest.raises(SAEError, match="alice/saes exists and is public"):
        hub.upload(made.folder, evaluation, private)
    assert commits(server) == n_commits


def test_names_on_the_hub_are_the_same_in_any_case(
    server: MiniHub, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    for token in ("hf_alice", "hf_bob"):  # a new repository, and one that is there
        monkeypatch.setenv("HF_TOKEN", token)
        access.check_access(RepoConfig(hf_repo_id="Acme/New"))
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    access.check_access(RepoConfig(hf_repo_id="ALICE/new"))
    first = hub.upload(made.folder, made.evaluation, REPO)
    shouted = RepoConfig(hf_repo_id="Alice/SAEs", hf_license="mit", hf_dataset="Alice/Texts")
    for token in ("hf_alice", "hf_fine"):
        monkeypatch.setenv("HF_TOKEN", token)
        access.check_access(shouted)
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    again = hub.upload(made.folder, made.evaluation, replace(shouted, hf_dataset="alice/texts"))
    assert (again.repo, again.commit, again.files) == ("alice/saes", first.commit, first.files)
    other = make_sae_directory(made.folder.with_name("other"), seed=1)
    marker = hub.upload(other.folder, None, shouted)
    assert list(server.repositories) == ["alice/saes"] and marker.repo == "alice/saes"
    card = server.files("alice/saes")["README.md"].decode()
    assert card.count("/texts") == 1, "one dataset"
    assert hub.verify(hub.Marker(**{**marker.__dict__, "repo": "ALICE/saes"})) == []
    assert list_pretrained("Alice/SAES") == [NAME, "other"]
    assert torch.equal(load_pretrained("Alice/SAES/other").W_dec, other.sae.W_dec)


def test_verify_names_what_differs(server: MiniHub, made: Made) -> None:
    marker = hub.upload(made.folder, made.evaluation, REPO)
    path = f"{NAME}/config.json"
    server.commit("alice/saes", {path: b"{}"})
    assert hub.verify(marker) == [], "the marker's commit still has it"
    head = server.repositories["alice/saes"].head
    assert hub.verify(hub.Marker(**{**marker.__dict__, "commit": head})) == [path]


def test_the_command_verifies_markers(
    server: MiniHub, made: Made, tmp_path: Path, run: Run
) -> None:
    marker = hub.upload(made.folder, made.evaluation, REPO)
    marker.save(tmp_path / "marker.json")
    command = ("sae_core/publishing/verify.py", tmp_path / "marker.json")
    where = environment(server, tmp_path / "home")
    assert f"{NAME} in alice/saes" in run(*command, env=where).stdout
    spoilt = hub.Marker(**{**marker.__dict__, "files": {f"{NAME}/config.json": "0" * 64}})
    spoilt.save(tmp_path / "marker.json")
    done = run(*command, env=where, ok=False)
    assert f"differs in {NAME}/config.json" in done.stdout and "1 files" in done.stderr


SEND = """
import sys, pathlib
from sae_core.publishing import hub
from sae_core.settings.services import RepoConfig
for name in sys.argv[2:]:
    hub.upload(pathlib.Path(name), None, RepoConfig(hf_repo_id=sys.argv[1]))
"""


def send(server: MiniHub, home: Path, *folders: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SEND, "alice/saes", *map(str, folders)],
        cwd=ROOT,
        env={**os.environ, **environment(server, home)},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_in_mid_upload_nothing_shows_and_the_next_try_succeeds(
    server: MiniHub, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # this test waits
    server.fail("PUT /_lfs", silence=30, times=1)
    process = send(server, tmp_path / "home", made.folder)
    deadline = time.monotonic() + 60
    while server.faults[0].times and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert server.faults[0].times == 0, "killed while it sent a file"
    assert set(server.files("alice/saes")) == {".gitattributes"}
    again = send(server, tmp_path / "home", made.folder)
    assert again.wait(timeout=60) == 0, again.communicate()[1]
    assert f"{NAME}/weights.pt" in server.files("alice/saes")


def test_uploads_at_once_lose_no_line_of_the_list(
    server: MiniHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # these processes wait
    names = [f"m.blocks.{layer}.hook_resid_post.btop3sae.exp4" for layer in range(6)]
    folders = [make_sae_directory(tmp_path / name, seed=i).folder for i, name in enumerate(names)]
    processes = [send(server, tmp_path / f"home{i}", *folders[i::2]) for i in range(2)]
    for process in processes:
        assert process.wait(timeout=120) == 0, process.communicate()[1]
    card = server.files("alice/saes")["README.md"].decode()
    listed = [line.split("](")[0][3:] for line in card.splitlines() if line.startswith("| [")]
    assert listed == names


# Rights, before anything is trained


@pytest.mark.parametrize(
    ("token", "repo", "words"),
    [
        ("hf_wrong", "alice/saes", "the token is not valid"),
        ("hf_reader", "alice/new", "may not write there"),
        ("hf_reader", "alice/saes", "may not write there"),
        ("hf_bob", "alice/new", "may not create a repository under alice; it may under bob, acme"),
        ("hf_bob", "alice/saes", "no permission for this"),
        ("hf_alice", "club/saes", "may not create a repository under club"),
        ("hf_fine", "alice/new", "may not write there"),
    ],
)
def test_a_token_without_the_right_is_found_out(
    token: str, repo: str, words: str, server: MiniHub, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.upload(made.folder, None, REPO)
    before = server.files("alice/saes")
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(SAEError, match=words) as error:
        access.check_access(RepoConfig(hf_repo_id=repo))
    assert repo in str(error.value) and token not in str(error.value)
    assert server.files("alice/saes") == before and list(server.repositories) == ["alice/saes"]


@pytest.mark.parametrize(
    ("token", "repo"),
    [
        ("hf_alice", "alice/saes"),
        ("hf_alice", "alice/new"),
        ("hf_alice", "acme/new"),
        ("hf_fine", "alice/saes"),
    ],
)
def test_the_check_lets_pass_and_changes_nothing(
    token: str, repo: str, server: MiniHub, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.upload(made.folder, None, REPO)
    monkeypatch.setenv("HF_TOKEN", token)
    access.check_access(RepoConfig(hf_repo_id=repo))
    assert list(server.repositories) == ["alice/saes"] and commits(server) == 2


def test_without_a_token_it_says_how_to_log_in(
    server: MiniHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(SAEError, match="run `hf auth login` or set HF_TOKEN"):
        access.check_access(REPO)


@pytest.mark.parametrize("name", ["saes", "a/b/c", "a/", "a/b c", "-a/b", "a--b/c", "a/b.git"])
def test_a_name_that_the_hub_would_not_take(name: str) -> None:
    with pytest.raises(SAEError, match="--hf-repo-id"):
        RepoConfig(hf_repo_id=name)
