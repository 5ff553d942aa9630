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
from dataclasses import replace
from pathlib import Path

import httpcore2
import pytest
import torch
from minihub import MiniHub
from published import Made, environment, hub_here, make_sae_directory
from running import ROOT, Run
from synthetic import OLD_KEYS

from sae_core import list_pretrained, load_pretrained
from sae_core.models import model_sources
from sae_core.models.model_sources import FetchConfig
from sae_core.publishing import access, hub
from sae_core.settings.services import RepoConfig
from sae_core.utils import hub_client as client
from sae_core.utils.errors import SAEError

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
    ("status", "words"),
    [(401, "hf auth login"), (403, "no permission"), (404, "no such repository")],
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
    with pytest.raises(SAEError, match="the token has no permission for this"):
        hub.upload(made.folder, None, REPO)
    assert not no_waiting


def test_a_hub_that_stays_down_is_given_up(
    server: MiniHub, made: Made, no_waiting: list[float]
) -> None:
    hub.upload(made.folder, None, REPO)
    server.fail(f"POST {API}/commit", status=503, times=99)
    with pytest.raises(SAEError, match="try again when the Hub can be reached"):
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


def slow(monkeypatch: pytest.MonkeyPatch, patience: float = 1.5) -> None:
    """Let a second do for a minute."""
    monkeypatch.undo()
    monkeypatch.setattr(client, "TIMEOUT", 0.3)
    monkeypatch.setattr(client, "PATIENCE", patience)
    monkeypatch.setattr(client, "WAITS", (0.05,))


@pytest.mark.parametrize(
    "pattern",
    [
        f"GET {API}$",
        "POST .*/objects/batch",
        "PUT /_lfs",
    ],
)
def test_an_answer_that_drips_is_given_up(
    pattern: str, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a second a byte, in the headers or behind them: each byte comes in time."""
    slow(monkeypatch)
    with hub_here(tmp_path, monkeypatch, xet=False) as server:
        hub.upload(make_sae_directory(tmp_path / "other", seed=1).folder, None, REPO)
        server.fail(pattern, drip=0.1, times=99)
        began = time.monotonic()
        with pytest.raises(SAEError, match="try again when the Hub can be reached"):
            hub.upload(made.folder, None, REPO)
        assert time.monotonic() - began < 8 and server.faults[0].times < 99


@pytest.mark.parametrize("pattern", ["GET /_cdn", "HEAD .*/resolve/"])
def test_a_download_that_drips_is_given_up(
    pattern: str, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch)
    with hub_here(tmp_path, monkeypatch, xet=False) as server:
        hub.upload(made.folder, None, REPO)
        server.fail(pattern, drip=0.1, times=99)
        began = time.monotonic()
        with pytest.raises(SAEError, match="try again when the Hub can be reached"):
            load_pretrained(f"alice/saes/{NAME}")
        assert time.monotonic() - began < 8 and server.faults[0].times < 99


def test_a_model_that_drips_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch)
    with hub_here(tmp_path, monkeypatch, xet=False) as server:
        hub.upload(make_sae_directory(tmp_path / "other").folder, None, REPO)
        server.commit("alice/saes", {"config.json": b"{}", "tokenizer.json": b"{}" * 50})
        server.fail("GET .*/resolve/", drip=0.1, times=99)
        began = time.monotonic()
        with pytest.raises(SAEError, match="cannot be fetched from the Hub"):
            model_sources._from_hub(FetchConfig("alice/saes"))
        assert time.monotonic() - began < 8 and server.faults[0].times < 99


def test_a_connection_has_a_least_speed_each_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the time that it is waited for: a slow reader or a slow start is no slow connection."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    class Stream:
        seconds = 1.0

        def read(self, most: int, timeout: float) -> bytes:
            now[0] += self.seconds
            return b"x" * min(most, 25_000)

        def write(self, data: memoryview, timeout: float) -> None:
            now[0] += self.seconds

    stream = Stream()
    paced = client.PacedStream(stream)
    for _ in range(100):
        assert len(paced.read(1 << 16)) == 25_000
        now[0] += 60  # what is done with it
    stream.seconds = client.TIMEOUT - 1  # the server thinks
    paced.write(b"a request")
    paced.read(1 << 16)
    stream.seconds = 1
    assert len(paced.read(1 << 16)) == 25_000
    with pytest.raises(httpcore2.ReadTimeout):
        for _ in range(40):
            paced.read(10_000)
    paced.write(b"x" * 40 * client.BLOCK)
    stream.seconds = 5
    with pytest.raises(httpcore2.WriteTimeout):
        paced.write(b"x" * 40 * client.BLOCK)


@pytest.mark.parametrize(
    ("pattern", "headers"),
    [
        ("POST .*/objects/batch", {"Retry-After": "3600"}),
        ("PUT /_lfs", {"Retry-After": "3600"}),
        (f"POST {API}/commit", {"Retry-After": "3600"}),
        ("POST .*/objects/batch", {"RateLimit": '"api";r=0;t=3600'}),
        ("POST .*/objects/batch", {"Retry-After": "99999999999999999999"}),
    ],
)
def test_the_hub_may_ask_for_a_minute_and_no_more(
    pattern: str, headers: dict, server: MiniHub, made: Made, no_waiting: list[float]
) -> None:
    server.fail(pattern, status=429, headers=headers)
    hub.upload(made.folder, None, REPO)
    assert 50 <= max(no_waiting) <= client.MAX_WAIT + 1
    assert server.faults[0].times == 0


def test_all_waits_together_have_a_bound(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client's, which waits within a try, and those between tries."""
    slow(monkeypatch, patience=1.5)
    with hub_here(tmp_path, monkeypatch, xet=False) as server:
        hub.upload(make_sae_directory(tmp_path / "other", seed=1).folder, None, REPO)
        server.fail("POST .*/objects/batch", status=503, headers={"Retry-After": "1"}, times=99)
        began = time.monotonic()
        with pytest.raises(SAEError, match="when the Hub can be reached"):
            hub.upload(made.folder, None, REPO)
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("fault", [{"silence": 30}, {"drip": 0.1, "status": 503}])
@pytest.mark.parametrize("way", ["up", "down"])
def test_xets_own_client_has_a_bound_too(
    way: str, fault: dict, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch, patience=2)
    with hub_here(tmp_path, monkeypatch) as server:
        hub.upload(make_sae_directory(tmp_path / "other", seed=1).folder, None, REPO)
        if way == "down":
            hub.upload(made.folder, None, REPO)
        monkeypatch.setattr(type(server), "cas_url", f"{server.url}/_cas")
        server.fail("/_cas", times=999, **fault)
        began = time.monotonic()
        with pytest.raises(SAEError, match="when the Hub can be reached"):
            if way == "down":
                load_pretrained(f"alice/saes/{NAME}")
            else:
                hub.upload(made.folder, None, REPO)
        assert time.monotonic() - began < 8 and server.faults[0].times < 999


def test_a_hub_that_cannot_be_asked_for_its_card_is_not_given_a_new_one(
    server: MiniHub, made: Made
) -> None:
    hub.upload(made.folder, None, REPO)
    server.commit("alice/saes", {"README.md": b"# Ours\n\nBy hand.\n"})
    server.fail("HEAD .*/resolve/.*/README.md", cut_after=0, times=999)
    with pytest.raises(SAEError, match="when the Hub can be reached"):
        hub.upload(made.folder, made.evaluation, REPO)
    assert server.files("alice/saes")["README.md"] == b"# Ours\n\nBy hand.\n"


@pytest.mark.parametrize("status", [400, 413, 422])
def test_what_trying_again_does_not_mend_says_so(
    status: int, server: MiniHub, made: Made, no_waiting: list[float]
) -> None:
    hub.upload(made.folder, None, REPO)
    server.fail(f"POST {API}/commit", status=status, times=99)
    with pytest.raises(SAEError, match="trying again does not help") as error:
        hub.upload(made.folder, made.evaluation, REPO)
    assert "try again when" not in str(error.value)
    assert server.faults[0].times == 98 and not no_waiting


@pytest.mark.parametrize("token", ["hf_\xe4lice", "hf_al\u200bice", "hf_alice\x00"])
def test_a_token_that_cannot_be_sent_is_named(
    token: str,
    server: MiniHub,
    made: Made,
    no_waiting: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import hf_api, utils

    for module in (client, hf_api, utils._headers):
        monkeypatch.setattr(module, "get_token", lambda: token, raising=False)
    for call in (lambda: hub.upload(made.folder, None, REPO), lambda: access.check_access(REPO)):
        with pytest.raises(SAEError, match="hf auth login") as error:
            call()
        said = str(error.value).replace("alice/saes", "")
        assert "again" not in said and "alice" not in said and not no_waiting


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
