"""A Hub that fails: what is tried again, what is given up, and after how long."""

import time
from pathlib import Path

import httpcore2
import pytest
import torch
from minihub import MiniHub
from published import API, NAME, REPO, Made, commits, hub_here, make_sae_directory

from sae_core import load_pretrained
from sae_core.models import model_sources
from sae_core.models.model_sources import FetchConfig
from sae_core.publishing import access, hub
from sae_core.utils import hub_client as client
from sae_core.utils.errors import SAEError

pytestmark = pytest.mark.usefixtures("no_waiting")


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
