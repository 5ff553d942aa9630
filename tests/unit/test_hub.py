"""Uploads by the unmodified client to a Hub on this machine, and what goes wrong there."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from minihub import MiniHub
from published import Made, environment, hub_here, make_sae_directory
from running import ROOT, Run
from synthetic import OLD_KEYS

from sae_core import list_pretrained, load_pretrained
from sae_core.errors import SAEError
from sae_core.publishing import client, hub
from sae_core.train_config import RepoConfig

NAME = "Qwen_Qwen3-0.6B.blocks.13.hook_resid_post.btop3sae.exp4"
REPO = RepoConfig(hf_repo_id="alice/saes", hf_license="mit", hf_dataset="alice/texts")
API = "/api/models/alice/saes"


@pytest.fixture(params=[True, False], ids=["xet", "lfs"])
def both(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MiniHub]:
    """The Hub, once with Xet and once with LFS."""
    with hub_here(tmp_path, monkeypatch, xet=request.param) as server:
        yield server


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MiniHub]:
    with hub_here(tmp_path, monkeypatch, xet=False) as server:
        yield server


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make_sae_directory(tmp_path / NAME)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waiting is noted, not done."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


def commits(server: MiniHub) -> int:
    return len(server.repositories["alice/saes"].commits)


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
    client.check_access(private)
    server.repositories["alice/saes"].private = False
    with pytest.raises(SAEError, match="alice/saes exists and is public"):
        client.check_access(private)


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


# Faults


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        ("POST /api/repos/create", {"status": 503, "times": 2}),
        (f"GET {API}$", {"status": 502}),
        (f"POST {API}/preupload", {"status": 500}),
        (f"POST {API}/commit", {"status": 503, "times": 2}),
        (f"POST {API}/commit", {"status": 429, "headers": {"Retry-After": "7"}}),
        (f"POST {API}/commit", {"cut_after": 100}),
        ("PUT /_lfs", {"cut_after": 500}),
        ("PUT /_lfs", {"status": 503, "times": 2}),
        ("POST .*/objects/batch", {"status": 429, "headers": {"Retry-After": "7"}}),
    ],
)
def test_what_may_pass_is_tried_again(
    pattern: str, fault: dict, server: MiniHub, made: Made, no_waiting: list[float]
) -> None:
    server.fail(pattern, **fault)
    marker = hub.upload(made.folder, made.evaluation, REPO)
    assert hub.verify(marker) == [] and commits(server) == 2
    assert all(fault.times == 0 for fault in server.faults)
    assert len(no_waiting) >= fault.get("times", 1)
    if "headers" in fault:
        assert 7 <= max(no_waiting) <= 8, "as long as the Hub asks"


@pytest.mark.parametrize(
    ("status", "words"), [(401, "hf auth login"), (403, "no right"), (404, "no such repository")]
)
def test_what_will_not_pass_is_not_tried_again(
    status: int, words: str, server: MiniHub, made: Made, no_waiting: list[float]
) -> None:
    hub.upload(made.folder, None, REPO)
    server.fail(f"POST {API}/commit", status=status, times=99)
    with pytest.raises(SAEError, match=words) as error:
        hub.upload(made.folder, made.evaluation, REPO)
    assert NAME in str(error.value) and "alice/saes" in str(error.value)
    assert "\n" not in str(error.value) and "hf_alice" not in str(error.value)
    assert server.faults[0].times == 98 and not no_waiting


def test_what_xet_is_refused_is_not_tried_again(
    both: MiniHub, made: Made, no_waiting: list[float]
) -> None:
    hub.upload(make_sae_directory(made.folder.with_name("other"), seed=1).folder, None, REPO)
    both.fail("GET .*/xet-write-token/|POST .*/objects/batch", status=403, times=99)
    with pytest.raises(SAEError, match="the token has no right to do this"):
        hub.upload(made.folder, None, REPO)
    assert not no_waiting


def test_a_hub_that_stays_down_is_given_up(
    server: MiniHub, made: Made, no_waiting: list[float]
) -> None:
    hub.upload(made.folder, None, REPO)
    server.fail(f"POST {API}/commit", status=503, times=99)
    with pytest.raises(SAEError, match="nothing is lost; run the same again"):
        hub.upload(made.folder, made.evaluation, REPO)
    assert 99 - server.faults[0].times == 1 + len(client.WAITS)
    assert no_waiting == list(client.WAITS)
    server.faults.clear()
    assert hub.verify(hub.upload(made.folder, made.evaluation, REPO)) == []


def test_a_silent_server_is_given_up(
    server: MiniHub, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "TIMEOUT", 0.2)
    server.fail(f"GET {API}$", silence=30, times=99)
    with pytest.raises(SAEError, match="when the Hub can be reached"):
        hub.upload(made.folder, None, REPO)
    assert 99 - server.faults[0].times == 1 + len(client.WAITS)


def test_a_commit_whose_answer_is_lost_is_not_made_twice(server: MiniHub, made: Made) -> None:
    hub.upload(made.folder, None, REPO)
    server.fail(f"POST {API}/commit", lose_answer=True)
    marker = hub.upload(made.folder, made.evaluation, REPO)
    assert server.faults[0].times == 0 and commits(server) == 3
    assert marker.commit == server.repositories["alice/saes"].head


def test_a_download_that_is_cut_is_tried_again(server: MiniHub, made: Made) -> None:
    hub.upload(made.folder, None, REPO)
    server.fail("GET /_cdn/", cut_after=300)
    sae = load_pretrained(f"alice/saes/{NAME}")
    torch.testing.assert_close(sae.W_dec, made.sae.W_dec)
    assert server.faults[0].times == 0


SEND = """
import sys, pathlib
from sae_core.publishing import hub
from sae_core.train_config import RepoConfig
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
    process.communicate(timeout=30)
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
        ("hf_bob", "alice/new", "may not make a repository under alice; it may under bob, acme"),
        ("hf_bob", "alice/saes", "no right to do this"),
        ("hf_alice", "club/saes", "may not make a repository under club"),
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
        client.check_access(RepoConfig(hf_repo_id=repo))
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
    client.check_access(RepoConfig(hf_repo_id=repo))
    assert list(server.repositories) == ["alice/saes"] and commits(server) == 2


def test_without_a_token_it_says_how_to_log_in(
    server: MiniHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(SAEError, match="run `hf auth login` or set HF_TOKEN"):
        client.check_access(REPO)


@pytest.mark.parametrize("name", ["saes", "a/b/c", "a/", "a/b c", "-a/b", "a--b/c", "a/b.git"])
def test_a_name_that_the_hub_would_not_take(name: str) -> None:
    with pytest.raises(SAEError, match="--hf-repo-id"):
        RepoConfig(hf_repo_id=name)


# Back from the Hub


def test_load_pretrained(both: MiniHub, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    first = hub.upload(made.folder, made.evaluation, REPO)
    newer = make_sae_directory(made.folder, seed=1)
    hub.upload(newer.folder, newer.evaluation, REPO)
    sae, history = load_pretrained(f"alice/saes/{NAME}", with_history=True)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sae(x), newer.sae(x).detach(), rtol=0, atol=0)
    assert history == {"epoch": [1, 2], "loss": [2.0, 1.0]}
    old = load_pretrained(f"alice/saes/{NAME}", revision=first.commit)
    torch.testing.assert_close(old.W_dec, made.sae.W_dec.detach(), rtol=0, atol=0)
    both.requests.clear()
    load_pretrained(f"alice/saes/{NAME}", revision=first.commit)
    assert not [r for r in both.requests if "resolve" in r.path or "_cdn" in r.path], "cached"
    assert list_pretrained("alice/saes") == [NAME]
    assert list_pretrained("alice/saes", revision=first.commit) == [NAME]


def test_an_sae_in_the_older_form_loads(server: MiniHub, made: Made) -> None:
    hub.upload(made.folder, None, REPO)
    weights = io.BytesIO()
    torch.save({name: made.sae.tensors()[name] for name in made.sae.weights._fields} |
               {"threshold": torch.tensor(0.4)}, weights)  # fmt: skip
    config = json.dumps(OLD_KEYS).encode()
    server.commit("alice/saes", {"old/weights.pt": weights.getvalue(), "old/config.json": config})
    assert list_pretrained("alice/saes") == [NAME, "old"]
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    old = load_pretrained("alice/saes/old")
    torch.testing.assert_close(old(x), made.sae(x).detach(), rtol=0, atol=0)
    with pytest.raises(SAEError, match="history.json: not a readable training history"):
        load_pretrained("alice/saes/old", with_history=True)


def test_the_package_brings_torch_only_when_it_is_needed(run: Run) -> None:
    code = "import sys, sae_core; print('torch' in sys.modules, sae_core.load_pretrained.__name__)"
    assert run("-c", code).stdout.split() == ["False", "load_pretrained"]


def test_load_pretrained_by_path_and_by_name(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for root in ("sae_core/pretrained_models", "results/saes"):
        folder = make_sae_directory(tmp_path / root / f"in_{root[:3]}").folder
        for name in (folder, folder.name):
            torch.testing.assert_close(load_pretrained(name).W_dec, made.sae.W_dec.detach())


@pytest.mark.parametrize("name", ["nothing", "alice/saes", "/nowhere/at/all"])
def test_what_is_no_name_of_an_sae(name: str) -> None:
    with pytest.raises(SAEError, match="no such SAE directory"):
        load_pretrained(name)


def test_what_the_hub_does_not_have(server: MiniHub, made: Made) -> None:
    hub.upload(made.folder, None, REPO)
    with pytest.raises(SAEError, match="alice/saes/other: no such folder"):
        load_pretrained("alice/saes/other")
    with pytest.raises(SAEError, match="alice/nothing/x: no such repository"):
        load_pretrained("alice/nothing/x")
    with pytest.raises(SAEError, match="alice/nothing: no such repository"):
        list_pretrained("alice/nothing")
