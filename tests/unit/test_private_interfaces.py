"""What this project uses of other libraries although it is private or undocumented. Where a test
fails here, a new release of that library has ended it."""

import dataclasses
import inspect
import os
import re
from importlib.metadata import version
from pathlib import Path

import httpcore2
import httpx2
import pytest
import tyro
from miniwandb import KEY, MiniWandb
from running import ROOT, run_python
from snakemake.api import SnakemakeApi  # first: snakemake's modules import each other
from snakemake.dag import DAG
from snakemake.workflow import Workflow
from tiny_model import tokenizer
from transformers import PreTrainedTokenizerFast

from sae_core.corpus.tokens import is_plain
from sae_core.model_training.wandb_session import is_outage, is_refusal
from sae_core.utils import cli, hub_client


def changed(library: str, what: str) -> str:
    return f"{library} {version(library)} changed {what}"


@pytest.mark.xdist_group("alone")
def test_a_group_of_tests_has_one_worker(request: pytest.FixtureRequest) -> None:
    """By the names of its tests, to which xdist adds the group's. Without it, what a module's tests
    share, such as a cluster, is made once by each worker."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        assert request.node.nodeid.endswith("@alone"), changed("pytest", "the id of a test")


def test_the_hubs_client_takes_another_network() -> None:
    """Every connection asks it, also those by a proxy."""

    class Asked(Exception):
        pass

    class Network(httpcore2.SyncBackend):
        def connect_tcp(self, *args: object, **options: object) -> httpcore2.NetworkStream:
            raise Asked

    def connects_through(client: httpx2.Client) -> bool:
        hub_client._connect_through(client, Network())
        with client, pytest.raises((Asked, httpx2.ConnectError)) as error:
            client.get("http://127.0.0.1:9")
        return error.type is Asked

    what = changed("httpx2", "where its connections are made: hub_client._connect_through")
    proxies = {"http://": httpx2.HTTPTransport(proxy="http://127.0.0.1:9")}
    assert connects_through(httpx2.Client()), what
    assert connects_through(httpx2.Client(mounts=proxies)), what


def test_a_tokenizer_in_rust_encodes_in_one_place() -> None:
    """A class that does something of its own before or after does it there."""

    class Own(PreTrainedTokenizerFast):
        def _encode_plus(self, *_: object, **__: object) -> dict[str, object]:
            return {"input_ids": "its own"}

    made = Own(tokenizer_object=tokenizer("a text").backend_tokenizer)
    what = changed("transformers", "where its tokenizers encode: sae_core.corpus.tokens.is_plain")
    assert made(["a text"])["input_ids"] == "its own" and not is_plain(made), what


def test_the_hubs_library_makes_a_client() -> None:
    what = changed("huggingface_hub", "how its client is made: hub_client._plain_client")
    with hub_client._plain_client() as client:
        assert isinstance(client, httpx2.Client), what
        assert client.follow_redirects and client.event_hooks["request"], what


def test_an_upload_to_xet_can_be_ended() -> None:
    try:
        hub_client._abort_xet()
    except (ImportError, AttributeError) as error:
        pytest.fail(f"{changed('huggingface_hub', 'how Xet is ended: _abort_xet')}: {error}")


def test_tyro_prints_no_colours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @dataclasses.dataclass
    class Settings:
        value: int = 1

    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setitem(tyro._experimental_options, "ansi_codes", True)
    coloured = []
    for no_colour in ("", "1"):
        monkeypatch.setenv("NO_COLOR", no_colour)
        with pytest.raises(SystemExit):
            cli.parse(Settings, "", ["--help"])
        coloured.append("\x1b[" in capsys.readouterr().out)
    assert coloured == [True, False], changed("tyro", "its colours: cli._print_plainly")


def test_snakemake_has_what_the_rules_ask_it_for() -> None:
    rules = [ROOT / "workflow/Snakefile", *ROOT.glob("workflow/rules/*.smk")]
    text = "".join(path.read_text(encoding="utf-8") for path in rules)
    used = set(re.findall(r"(?<![\w./])workflow\.([a-z_]+)\b(?!\.\w+ import)", text)) - {"rst"}
    assert "dag" in used and len(used) > 5
    there = {*dir(Workflow), *re.findall(r"\bself\.(\w+)", inspect.getsource(Workflow))}
    assert used <= there, changed("snakemake", f"its workflow: no {', '.join(used - there)}")
    assert callable(getattr(DAG, "needrun_jobs", None)), changed("snakemake", "DAG.needrun_jobs")
    assert SnakemakeApi


def test_wandb_keeps_its_background_process() -> None:
    # Not above: the import takes a second, which few tests need.
    from wandb.sdk.lib.service.service_connection import ServiceConnection
    from wandb.sdk.lib.service.service_process import ServiceProcess

    made = inspect.signature(ServiceConnection).parameters
    assert "proc" in made and "self._proc = proc" in inspect.getsource(ServiceConnection)
    kept = "self._process = process" in inspect.getsource(ServiceProcess)
    assert kept, changed("wandb", "the handle of its background process")


LOGIN = """
import os, wandb
os.environ["WANDB_HTTP_TIMEOUT"] = "1"
wandb.setup(wandb.Settings(silent=True))
try:
    wandb.login(prompt=False, verify=True)
except wandb.errors.Error as error:
    print("refused:", " ".join(str(error).split()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["silent", "not W&B's answer", "another key"])
def test_wandb_says_in_these_words_why_a_login_fails(fault: str, tmp_path: Path) -> None:
    with MiniWandb() as server:
        server.silent = "." if fault == "silent" else None
        server.strange = fault == "not W&B's answer"
        key = "x" * 40 if fault == "another key" else KEY
        given = {"HOME": str(tmp_path), "WANDB_BASE_URL": server.url, "WANDB_API_KEY": key}
        said = run_python("-c", LOGIN, cwd=tmp_path, env=given).stdout
    assert said.startswith("refused:"), said
    expected = (False, True) if fault == "another key" else (True, False)
    what = changed("wandb", f"the words for a login that fails: {said}")
    assert (is_outage(said), is_refusal(said)) == expected, what
