"""Both training command lines with tracking and uploads, against services on this machine."""

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from minihub import MiniHub
from miniwandb import KEY, MiniWandb
from planted import SECRETS, check_no_secret
from published import environment, make_sae_directory
from running import Run

from sae_core.model_training.Qwen3_all_sae_training import GROUP, BatchConfig
from sae_core.train_config import RunConfig
from sae_core.utils import cli

pytestmark = pytest.mark.slow

SINGLE = "sae_core/model_training/single_sae_training.py"
BATCH = "sae_core/model_training/Qwen3_all_sae_training.py"
PUBLISH = "--upload-to-hf --hf-repo-id alice/saes --hf-base-model Qwen/Qwen3-0.6B"
COMMIT = "POST /api/models/alice/saes/commit"
TOKEN = "hf_alice"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MiniHub]:
    with MiniHub(tmp_path / "hub", xet=False) as server:
        yield server


@pytest.fixture
def wandb() -> Iterator[MiniWandb]:
    with MiniWandb() as wandb:
        yield wandb


@pytest.fixture
def command(
    server: MiniHub, wandb: MiniWandb, tmp_path: Path, tiny_model: Path, data_path: Path, run: Run
):
    """Run a short training with further options."""
    plain = SECRETS | {"HOME": str(tmp_path), "WANDB_BASE_URL": wandb.url, "WANDB_API_KEY": KEY}
    plain |= environment(server, tmp_path / "home", TOKEN) | {"WANDB_DIR": str(tmp_path)}
    base = f"--data-path {data_path} --device cpu --num-epochs 2 --max-text-length 32 --topk 4"
    base += f" --output-root {tmp_path / 'saes'} --checkpoint-root {tmp_path / 'points'}"
    base += " --tokens-per-step auto --lr auto --sae-expansion 2 --val-fraction 0.2"

    def start(script: str, options: str, ok: bool = True, **changes: str):
        models = "" if script == BATCH else f"--model-name {tiny_model}"
        arguments = shlex.split(f"{models} {base} {options}")
        return run(script, *arguments, ok=ok, env=plain | changes)

    return start


def test_a_single_run_is_tracked_and_uploaded(
    command, server: MiniHub, wandb: MiniWandb, tmp_path: Path
) -> None:
    printed = command(SINGLE, f"--wandb --wandb-tags a --run-name x {PUBLISH}").stdout
    points = tmp_path / "points/x"
    marker = json.loads((points / "upload.json").read_text())
    evaluation = json.loads((points / "evaluation.json").read_text())
    assert f"uploaded: {marker['url']}" in printed and "SAE: " in printed
    assert {f"x/{name}" for name in ("weights.pt", "evaluation.json", "README.md")} < set(
        server.files("alice/saes")
    )
    summary = wandb.only.summary
    assert summary["hf_repo"] == "alice/saes" and summary["hf_commit"] == marker["commit"]
    assert summary["eval/fvu"] == pytest.approx(evaluation["fvu"])
    assert summary["status"] == "completed" and summary["model_path"] == "x"
    assert {"a", "batch_topk", "layer 1"} <= set(wandb.only.tags)
    assert wandb.only.config["sae"]["topk"] == 4 and wandb.only.config["hook"]["hook_layer"] == 1
    recorded = json.loads((tmp_path / "saes/x/config.json").read_text())["metadata"]["training"]
    assert wandb.only.config["training"] == recorded and recorded["tokens_per_step"] == 256
    check_no_secret(tmp_path, printed, used=(TOKEN, KEY))


def test_the_batch_has_a_run_for_each_model_in_one_group(
    command, server: MiniHub, wandb: MiniWandb, tmp_path: Path, tiny_model: Path
) -> None:
    models = [shutil.copytree(tiny_model, tmp_path / name) for name in ("first", "second")]
    command(BATCH, f"--wandb {PUBLISH} --models {models[0]} {models[1]}")
    names = sorted(path.name for path in (tmp_path / "saes").iterdir())
    assert len(names) == 2
    assert sorted(run.about["displayName"] for run in wandb.runs.values()) == names
    assert {run.about["groupName"] for run in wandb.runs.values()} == {GROUP}
    card = server.files("alice/saes")["README.md"].decode()
    assert all(f"| [{name}](./{name}) |" in card for name in names)
    check_no_secret(tmp_path, used=(TOKEN, KEY))


def test_an_upload_that_fails_keeps_the_sae_and_says_what_to_run(
    command, server: MiniHub, tmp_path: Path, run: Run
) -> None:
    server.fail(COMMIT, status=403)
    done = command(SINGLE, f"--run-name x {PUBLISH}", ok=False)
    assert (tmp_path / "saes/x/weights.pt").is_file()
    assert not (tmp_path / "points/x/upload.json").exists()
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    [again] = re.findall(r"`python (scripts/upload.py .+?)`", line)
    run(*shlex.split(again), env=environment(server, tmp_path / "home", TOKEN))
    assert "x/weights.pt" in server.files("alice/saes")
    assert json.loads((tmp_path / "points/x/upload.json").read_text())["run_name"] == "x"


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (f"--run-name x {PUBLISH}", {"HF_TOKEN": "hf_planted_and_wrong"}),
        ("--run-name x --wandb", {"WANDB_API_KEY": "planted-and-wrong-" * 3}),
    ],
)
def test_a_traceback_shows_no_secret(
    options: str, wrong: dict[str, str], command, tmp_path: Path
) -> None:
    done = command(SINGLE, f"{options} --debug", ok=False, **wrong)
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    check_no_secret(tmp_path, done.stdout, done.stderr, used=(TOKEN, KEY, *wrong.values()))


@pytest.mark.parametrize("script", [SINGLE, BATCH])
def test_a_token_that_may_not_write_ends_it_before_anything_is_loaded(
    script: str, command, tmp_path: Path
) -> None:
    done = command(script, PUBLISH, ok=False, HF_TOKEN="hf_reader")
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("error: upload to alice/saes: the token may not write there")
    assert not done.stdout and not (tmp_path / "saes").exists()


def test_a_dry_run_says_what_would_be_sent_and_sends_nothing(
    server: MiniHub, tmp_path: Path, run: Run
) -> None:
    make_sae_directory(tmp_path / "saes/x")
    options = (
        f"--sae {tmp_path}/saes/x --marker {tmp_path}/m.json --hf-repo-id alice/saes --dry-run"
    )
    done = run("scripts/upload.py", *options.split(), env=environment(server, tmp_path / "home"))
    assert "x/weights.pt" in done.stdout and "x/README.md" in done.stdout
    assert not server.requests and not (tmp_path / "m.json").exists()


@pytest.mark.parametrize("settings", [RunConfig, BatchConfig])
def test_nothing_is_sent_unless_asked_for(settings: type) -> None:
    config = cli.parse(settings, "", [])
    assert not config.tracking.wandb and not config.publishing.upload_to_hf
