"""The workflow with uploads and tracking, against a Hub and a W&B server on this machine: what may
not be sent stops it before it starts, what fails later fails alone."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from minihub import MiniHub
from miniwandb import KEY, MiniWandb
from planted import SECRETS, check_no_secret
from preloaded import forking_python
from project import Project, make_project
from published import environment

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("publish")]

RUNS = [f"{m}.blocks.2.hook_resid_post.btop4sae.exp2" for m in ("other", "tiny")]
TOKEN = "hf_alice"


class Services(NamedTuple):
    hub: MiniHub
    wandb: MiniWandb


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    with MiniHub(tmp_path_factory.mktemp("hub"), xet=False) as hub, MiniWandb() as wandb:
        yield Services(hub, wandb)


def configured(folder: Path, root: Path, tiny_model: Path, services: Services) -> Project:
    """A project of two models with an SAE each that tells both services of them."""
    project = make_project(folder / "project", root, tiny_model)
    config = project.config
    [model] = config["models"]
    model |= {"layers": [2], "saes": [{"topk": 4}], "hf_base_model": "Qwen/Qwen3-0.6B"}
    config["models"] = [model, model | {"name": "other"}]
    config["tracking"] = {"wandb": True, "wandb_group": "g", "wandb_tags": ["two words"]}
    config["publishing"] = {"upload_to_hf": True, "hf_repo_id": "alice/saes", "hf_license": "mit"}
    project.configure(config)
    wandb = {"WANDB_BASE_URL": services.wandb.url, "WANDB_API_KEY": KEY, "HOME": str(folder)}
    project.environment = environment(services.hub, folder / "home", TOKEN) | wandb | SECRETS
    project.python = forking_python(project.variables())
    return project


@pytest.fixture(scope="module")
def published(
    tmp_path_factory: pytest.TempPathFactory, root: Path, tiny_model: Path, services: Services
) -> Project:
    """The project after a run in which the Hub refused one commit, and another run."""
    project = configured(tmp_path_factory.mktemp("published"), root, tiny_model, services)
    services.hub.fail("POST /api/models/alice/saes/commit", status=403)
    project.snakemake("--keep-going", ok=False)
    logs = [path.read_text() for path in (project.folder / "results/logs/upload").glob("*.log")]
    [line] = [line for log in logs for line in log.splitlines() if line.startswith("error: ")]
    assert "no permission for this" in line and "then try again" in line
    results = project.folder / "results"
    assert len(list((results / "uploads").iterdir())) == 1
    assert (
        len(list((results / "evaluations").iterdir())) == 2 and (results / "report.html").exists()
    )
    assert dict(project.planned().rules) == {"upload": 1, "all": 1}
    project.snakemake()
    return project


def test_every_sae_is_uploaded_and_marked(published: Project, services: Services) -> None:
    held = services.hub.files("alice/saes")
    for run in RUNS:
        marker = json.loads((published.folder / f"results/uploads/{run}.json").read_text())
        assert set(marker) == {"run_name", "repo", "commit", "url", "time", "files"}
        assert marker["commit"] in services.hub.repositories["alice/saes"].commits
        assert set(marker["files"]) == {path for path in held if path.startswith(f"{run}/")}
        evaluation = (published.folder / f"results/evaluations/{run}.json").read_bytes()
        assert held[f"{run}/evaluation.json"] == evaluation
        features = (published.folder / f"results/features/{run}.csv").read_bytes()
        assert held[f"{run}/features.csv"] == features
        card = yaml.safe_load(held[f"{run}/README.md"].decode().split("---")[1])
        assert card["base_model"] == "Qwen/Qwen3-0.6B" and card["license"] == "mit"
        assert f"[{run}](./{run})" in held["README.md"].decode()
    assert "Nothing to be done" in published.snakemake()


def test_every_sae_is_a_run_with_its_evaluation_and_its_commit(
    published: Project, services: Services
) -> None:
    runs = {run.about["displayName"]: run for run in services.wandb.runs.values()}
    assert sorted(runs) == RUNS and len(services.wandb.runs) == 2
    for name, run in runs.items():
        figures = json.loads((published.folder / f"results/evaluations/{name}.json").read_text())
        history = json.loads((published.folder / f"results/saes/{name}/history.json").read_text())
        marker = json.loads((published.folder / f"results/uploads/{name}.json").read_text())
        assert run.summary["status"] == "completed"
        assert run.summary["eval/fvu"] == pytest.approx(figures["fvu"])
        assert run.summary["hf_commit"] == marker["commit"]
        assert [row["train/loss"] for row in run.history.values()] == pytest.approx(history["loss"])
        assert run.config["hook"]["hook_spec"] == "blocks.2.hook_resid_post"
        assert run.about["groupName"] == "g" and "two words" in run.tags


def test_metrics_jsonl_agrees_with_the_history(published: Project) -> None:
    for run in RUNS:
        history = json.loads((published.folder / f"results/saes/{run}/history.json").read_text())
        lines = (published.folder / f"results/checkpoints/{run}/metrics.jsonl").read_text()
        events = [json.loads(line) for line in lines.splitlines()]
        epochs = [event for event in events if event["event"] == "epoch"]
        assert {key: [e.get(key) for e in epochs] for key in history} == history
        assert [e["event"] for e in (events[0], events[-1])] == ["start", "end"]


def test_no_secret_is_written(published: Project) -> None:
    """In no log, benchmark, configuration, history, marker or report, in no file of Snakemake, W&B
    or the Hub's client, and not on the terminal."""
    folder, results = published.folder.parent, published.folder / "results"
    assert list(folder.rglob("*.wandb")) and (published.folder / ".snakemake/log").is_dir()
    assert list(results.rglob("*.tsv")) and list(results.rglob("*.log"))
    assert len(published.printed) >= 3
    check_no_secret(folder, *published.printed, used=(TOKEN, KEY))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"HF_TOKEN": "hf_reader"}, "upload to alice/saes: the token may not write there"),
        ({"HF_TOKEN": "hf_wrong"}, "hf auth login"),
        ({"WANDB_API_KEY": "x" * 40}, "python -m wandb login"),
    ],
)
def test_what_would_not_be_let_in_stops_it_before_the_first_job(
    changes: dict[str, str],
    words: str,
    tmp_path: Path,
    root: Path,
    tiny_model: Path,
    services: Services,
) -> None:
    project = configured(tmp_path, root, tiny_model, services)
    project.environment |= changes
    printed = project.snakemake(ok=False)
    assert words in printed and "Traceback" not in printed
    assert not re.findall(r"^(?:local)?rule ", printed, re.MULTILINE)
    assert not list((project.folder / "results").rglob("*.json"))
    used = [project.environment[name] for name in ("HF_TOKEN", "WANDB_API_KEY")]
    check_no_secret(tmp_path, printed, used=(*used,))
