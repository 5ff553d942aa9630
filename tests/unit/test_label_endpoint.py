"""Labels from a chat service that has every fault, with the unmodified `openai` client."""

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import oracle
import pytest
from labelling_here import PER_FEATURE, SCRIPT, N, Run, all_are_good, answer, label_here
from minichat import KEY, Fault, MiniChat, kind
from running import run_here

from sae_core.labelling.config import AskingConfig, LabellerConfig, api_key, check_asking
from sae_core.labelling.endpoint import retry_after
from sae_core.labelling.label_files import read_labels
from sae_core.labelling.labels import Label
from sae_core.utils.errors import PassingError, SAEError


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[MiniChat]:
    with MiniChat(answer) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        yield server


@pytest.fixture
def run(server: MiniChat, tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    entries = tmp_path / "entries.jsonl"
    entries.write_text('{"feature": 1, "label": "x"}\n')
    places = [f"--{name}={tmp_path / name}" for name in ("labels", "table", "answers")]
    done = run_here(SCRIPT, "--entries", entries, *places, "--labeller", "m", ok=False)
    assert f"error: {entries}: not the features of an SAE with their windows" in done.stderr


# A service that works


def test_the_command(server: MiniChat, tmp_path: Path) -> None:
    printed = label_here(tmp_path)
    labels = list(read_labels(tmp_path / "labels.jsonl").values())
    assert all_are_good(labels)
    assert len(server.requests) == N * PER_FEATURE
    assert f"windows of the texts are sent to {server.base}" in printed
    assert f"{N} of {N} features are labelled; mean detection 1.00; mean fuzzing 1.00" in printed
    body = server.asked("label")[0]
    assert body["model"] == "m" and body["temperature"] == 0
    assert body["max_completion_tokens"] == LabellerConfig.answer_tokens
    assert server.keys == {KEY}
    rows = list(csv.DictReader((tmp_path / "labels.csv").open()))
    assert len(rows) == N and rows[2]["label"] == "word2" and rows[2]["detection"] == "1.0"


def test_options_that_a_service_may_not_have(run: Run, server: MiniChat) -> None:
    server.answer = lambda body: answer(body)
    assert all_are_good(run.labels(structured_answers=False, label_temperature=None))
    assert not any({"response_format", "temperature"} & set(body) for body in server.requests)


def test_requests_at_once(server: MiniChat, tmp_path: Path) -> None:
    server.gathers = 3
    assert all_are_good(Run(tmp_path, requests_at_once=3, request_seconds=60).labels())
    assert server.most_at_once == 3


def test_an_answer_in_parts(run: Run, server: MiniChat) -> None:
    text = json.dumps({"label": "x", "description": "y", "confidence": 1})
    server.faults = [
        completion(content=[{"type": "text", "text": part} for part in (text[:9], text[9:])])
    ]
    labels = run.labels(score_labels=False)  # of the feature whose request comes first
    assert [label[1:3] for label in labels].count(("x", "y")) == 1


def completion(finish_reason: str = "stop", **message: Any) -> dict[str, Any]:
    """The answer of a service."""
    return {"choices": [{"message": message, "finish_reason": finish_reason}]}


def test_a_service_without_a_key(
    run: Run, server: MiniChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    assert all_are_good(run.labels())


@pytest.mark.parametrize("usage", [None, {"prompt_tokens": 0, "completion_tokens": 0}])
def test_usage_that_is_missing_is_estimated(
    usage: dict[str, int] | None, run: Run, server: MiniChat
) -> None:
    server.usage = usage
    run.labels()
    whole = sum(len(json.dumps(body["messages"])) for body in server.requests)
    assert whole / 5 < run.asker.ledger.tokens_in < whole / 2
    assert run.asker.ledger.tokens_out > 0


# Faults that pass


@pytest.mark.parametrize("fault", [500, 503, 408, 409, "cut"])
def test_a_fault_that_passes(fault: Fault, server: MiniChat, tmp_path: Path) -> None:
    server.faults = [None, fault, None, fault, fault]  # type: ignore[list-item]
    run = Run(tmp_path, requests_at_once=1)
    assert all_are_good(run.labels())
    assert run.waits == [1, 1, 2]
    assert len(server.requests) == N * PER_FEATURE + 3


def test_answers_that_are_no_chat_completion(server: MiniChat, tmp_path: Path) -> None:
    faults: list[Fault] = ["not JSON", "HTML", "stream", "no choices", "nested", {"choices": []}]
    faults += [{"choices": [{"message": "x"}]}, {"error": {"message": "overloaded"}}]
    server.faults = [None, *faults]  # type: ignore[list-item]
    run = Run(tmp_path, requests_at_once=1, request_tries=len(faults) + 1)
    assert all_are_good(run.labels())
    assert len(run.waits) == len(faults) and max(run.waits) == 60


@pytest.mark.parametrize("fault", ["silence", "drip"])
def test_an_answer_that_does_not_come(fault: Fault, server: MiniChat, tmp_path: Path) -> None:
    server.faults = [None, fault]  # type: ignore[list-item]
    run = Run(tmp_path, requests_at_once=1, request_seconds=1)
    assert all_are_good(run.labels())
    assert run.waits == [1]


def test_retry_after_is_obeyed_by_all_requests(server: MiniChat, tmp_path: Path) -> None:
    server.faults, server.retry_after = [429], "30"
    run = Run(tmp_path, requests_at_once=3)
    assert all_are_good(run.labels())
    assert 20 < run.waits[0] <= 30 and len(run.waits) > 1, "the others wait, too"


def test_retry_after_is_a_number_or_a_date() -> None:
    assert retry_after("7") == 7 and retry_after("0.5") == 0.5
    assert retry_after(formatdate(time.time() + 60, usegmt=True)) == pytest.approx(60, abs=3)
    assert retry_after(formatdate(time.time() - 60, usegmt=True)) == 0
    assert retry_after(None) is retry_after("soon") is retry_after("nan") is None


def test_a_service_that_is_away_until_a_date(server: MiniChat, tmp_path: Path) -> None:
    server.faults, server.retry_after = [503], formatdate(time.time() + 120, usegmt=True)
    run = Run(tmp_path, requests_at_once=1)
    assert all_are_good(run.labels())
    assert 90 < run.waits[0] <= 120


def test_a_long_wait_ends_the_job_for_now(server: MiniChat, tmp_path: Path) -> None:
    server.faults, server.retry_after = [None] * 7 + [429], "3600"  # type: ignore[list-item]
    run = Run(tmp_path, requests_at_once=1)
    with pytest.raises(PassingError, match="3600 seconds.*run it again later"):
        run.labels()
    assert not run.waits
    server.faults = []
    assert all_are_good(run.labels())
    assert len(server.requests) == N * PER_FEATURE + 1, "what was answered is not asked again"


# Faults that stay


@pytest.mark.parametrize(
    ("fault", "message"),
    [(401, "OPENAI_API_KEY"), (403, "OPENAI_API_KEY"), (404, "OPENAI_BASE_URL"),
     (402, "no credit"), (405, "OPENAI_BASE_URL"), ("redirect", "leads elsewhere .http://127.0.0.1:1/v1")],
)  # fmt: skip
def test_a_fault_that_stays_ends_the_job_at_once(
    fault: Fault, message: str, server: MiniChat, tmp_path: Path
) -> None:
    server.always = fault
    run = Run(tmp_path, requests_at_once=1)
    with pytest.raises(SAEError, match=message) as found:
        run.labels()
    assert not isinstance(found.value, PassingError) and KEY not in str(found.value)
    assert len(server.requests) == 1 and not run.waits


@pytest.mark.parametrize("fault", [500, "silence", "not JSON"])
def test_a_service_that_never_answers_ends_the_job(
    fault: Fault, server: MiniChat, tmp_path: Path
) -> None:
    server.always = fault
    run = Run(tmp_path, requests_at_once=1, request_seconds=0.5)
    with pytest.raises(PassingError, match="gives no answer.*run it again later"):
        run.labels()
    assert run.waits == [1, 2, 4] and len(server.requests) == 4


def test_a_service_that_is_always_busy_ends_the_job(server: MiniChat, tmp_path: Path) -> None:
    server.always, server.retry_after = 429, "30"
    run = Run(tmp_path, requests_at_once=1, request_tries=2)
    with pytest.raises(PassingError, match="gives no answer"):
        run.labels()
    assert len(server.requests) == 10, "five times as often as one that fails"


def test_no_service_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    run = Run(tmp_path)
    with pytest.raises(PassingError, match="ConnectError"):
        run.labels()
    assert run.asker.ledger.spent == 0


def test_one_request_that_is_refused(server: MiniChat, tmp_path: Path) -> None:
    server.faults = [400]
    labels = Run(tmp_path, requests_at_once=1).labels()
    assert labels[0] == Label(0, status="refused")
    assert {label.status for label in labels[1:]} == {"ok"}


def test_a_service_that_refuses_everything(run: Run, server: MiniChat) -> None:
    server.always = 400
    with pytest.raises(SAEError, match="--no-structured-answers"):
        run.labels()


CALL = {"type": "function", "function": {"name": "label", "arguments": "{}"}}


@pytest.mark.parametrize(
    "fault",
    ["wrong schema", "null content", completion(content=None, refusal="I cannot help with that"),
     completion("tool_calls", content=None, tool_calls=[CALL]),
     completion("length", content='{"label": "x", "descr')],
)  # fmt: skip
def test_answers_not_in_the_schema(fault: Fault, run: Run, server: MiniChat) -> None:
    server.always = fault
    labels = run.labels()
    assert {label.status for label in labels} == {"invalid answer"}
    assert len(server.requests) == 2 * N, "each is asked again once"
    run.labels()
    assert len(server.requests) == 2 * N


# What is on disk


def test_a_killed_job_asks_only_for_the_rest(server: MiniChat, tmp_path: Path) -> None:
    n_before = 13
    server.faults = [None] * n_before  # type: ignore[list-item]
    server.always = "silence"
    entries = oracle.write_entries(tmp_path / "entries.jsonl", N)
    command = [sys.executable, SCRIPT, "--entries", entries, "--labels", tmp_path / "l.jsonl"]
    command += ["--table", tmp_path / "l.csv", "--answers", tmp_path / "answers.jsonl"]
    command += ["--labeller", "m"]
    process = subprocess.Popen([*map(str, command)], env=dict(os.environ))
    try:
        end = time.monotonic() + 60
        while len(server.requests) < n_before + 4 and time.monotonic() < end:
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    stored = (tmp_path / "answers.jsonl").read_bytes()
    assert stored.count(b"\n") == n_before
    (tmp_path / "answers.jsonl").write_bytes(stored + b'{"key": "torn')
    first, server.always, server.requests = server.requests[:n_before], None, []
    label_here(tmp_path)
    assert all_are_good(list(read_labels(tmp_path / "labels.jsonl").values()))
    assert len(server.requests) == N * PER_FEATURE - n_before
    assert not any(request in first for request in server.requests)
    assert (tmp_path / "answers.jsonl").read_bytes().startswith(stored)
    server.requests = []
    label_here(tmp_path)
    assert not server.requests


def test_other_settings_are_asked_anew(run: Run, server: MiniChat) -> None:
    run.labels()
    run.labels(answer_tokens=200)
    assert len(server.requests) == 2 * N * PER_FEATURE


def test_the_key_is_in_no_file(server: MiniChat, tmp_path: Path) -> None:
    """Although the service repeats it, in errors and in answers."""
    server.answer = lambda body: (
        {"label": f"x {KEY}", "description": KEY, "confidence": 1}
        if kind(body) == "label"
        else answer(body) | {"active": [True] * 5}
    )
    server.faults = [400]
    printed = label_here(tmp_path, "--requests-at-once", "1")
    server.always = 401
    printed += label_here(tmp_path, "--answer-tokens", "99", "--debug", ok=False)
    assert "fault 401" in printed and KEY not in printed
    found = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert "[OPENAI_API_KEY]" in found[tmp_path / "labels.jsonl"]
    assert not any(KEY in text for text in found.values())


@pytest.mark.parametrize("key", ["sk-ä", "sk-a b", "sk-a\nb"])
def test_a_key_that_cannot_be_sent(key: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(SAEError, match="no key has") as found:
        run.labels()
    assert key not in str(found.value) and api_key() == key


@pytest.mark.parametrize(
    "url", ["http://me:secret@host/v1", "http://host/v1?key=secret", "host/secret", "http://h:x/"]
)
def test_an_address_that_is_none_or_holds_a_key(url: str) -> None:
    with pytest.raises(SAEError, match="--endpoint") as found:
        check_asking(LabellerConfig(labeller="m"), AskingConfig(endpoint=url))
    assert "secret" not in str(found.value)
    check_asking(LabellerConfig(labeller="m", labeller_backend="local"), AskingConfig(endpoint=url))


# Before anything is asked


def test_a_dry_run_asks_nothing(server: MiniChat, tmp_path: Path) -> None:
    printed = label_here(tmp_path, "--dry-run", "--price-in", "10", "--price-out", "40")
    assert not server.requests and not (tmp_path / "labels.jsonl").exists()
    assert f"{N} features: {N * PER_FEATURE} requests" in printed and "cost: about 0." in printed
    server.usage = None
    label_here(tmp_path)
    again = label_here(tmp_path, "--dry-run")
    assert f"{N} features: 0 requests" in again and "give --price-in" in again


def test_without_an_endpoint_nothing_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert "set OPENAI_BASE_URL" in label_here(tmp_path, ok=False)
    assert f"{N * PER_FEATURE} requests" in label_here(tmp_path, "--dry-run")


def test_the_ceiling(server: MiniChat, tmp_path: Path) -> None:
    server.usage = {"prompt_tokens": 800, "completion_tokens": 200}
    printed = label_here(tmp_path, "--most-tokens", "12000", "--requests-at-once", "2")
    assert 8 <= len(server.requests) <= 12
    assert "the ceiling on tokens was reached" in printed
    found = read_labels(tmp_path / "labels.jsonl")
    assert {label.status for label in found.values()} == {"ok", "not asked"}
    label_here(tmp_path)
    assert all_are_good(list(read_labels(tmp_path / "labels.jsonl").values()))
    assert len(server.requests) == N * PER_FEATURE


def test_answers_that_are_lost_count_for_the_ceiling(server: MiniChat, tmp_path: Path) -> None:
    """They may have been charged; no try is made that might exceed it."""
    server.faults = [None]  # type: ignore[list-item]
    server.always = "HTML"
    run = Run(tmp_path, requests_at_once=1, request_tries=10)
    labels = run.labels(most_tokens=3000)
    assert {label.status for label in labels} == {"ok", "not asked"} and labels[0].detection is None
    assert 1000 < run.asker.ledger.spent <= 3000 and len(server.requests) == 5


# The environment


@pytest.mark.parametrize(
    ("name", "value"), [("ALL_PROXY", "socks5://127.0.0.1:1"), ("SSL_CERT_FILE", "/nowhere")]
)
def test_an_environment_that_the_client_cannot_use(
    name: str, value: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SAEError, match=f"variable of the environment.*{name}"):
        run.labels()


def test_a_proxy_is_named_without_its_password(
    server: MiniChat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://me:secret@127.0.0.1:1")
    run = Run(tmp_path, requests_at_once=1)
    with pytest.raises(PassingError, match="by the proxy 127.0.0.1:1, see NO_PROXY") as found:
        run.labels()
    assert "the proxy 127.0.0.1:1" in run.asker.chat.where
    assert "secret" not in f"{found.value}{run.asker.chat.where}"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert all_are_good(run.labels()) and "proxy" not in run.asker.chat.where
