"""The rule that labels features, with a look-alike of a chat service on this machine."""

import re
from typing import Any

import pytest
from minichat import KEY, MiniChat, kind
from oracle import write_entries
from project import Project

from sae_core.labelling.label_files import read_labels

pytestmark = pytest.mark.slow

N = 3
RUN = "tiny.blocks.2.hook_resid_post.btop4sae.exp2"
LABELS = f"results/labels/{RUN}.jsonl"
ONLY = ("--allowed-rules", "label", "--", LABELS)
"""The features are there, wherever they are from."""


def answer(body: dict[str, Any]) -> dict[str, Any]:
    if kind(body) == "label":
        return {"label": "a planted label", "description": "what it is", "confidence": 0.5}
    windows = re.findall(r"^\d+\. ", body["messages"][1]["content"], re.MULTILINE)
    return {"active": [True] * len(windows)}


def label(project: Project, **settings: Any) -> None:
    """Configure labels of a few features of one SAE."""
    config = project.config
    [model] = config["models"]
    model |= {"layers": [2], "saes": [{"topk": 4}]}
    section = {"label_features": True, "labeller": "m", "labelled_features": N, **settings}
    project.configure(config | {"labelling": section})


def test_labels_in_the_workflow(project: Project) -> None:
    label(project)
    features = project.folder / f"results/features/{RUN}.jsonl"
    features.parent.mkdir(parents=True)
    write_entries(features, N + 2)
    said = project.snakemake(*ONLY, ok=False)
    assert "set OPENAI_BASE_URL" in said and "rule label" not in said, "before any job"
    with MiniChat(answer) as server:
        project.environment = {"OPENAI_BASE_URL": server.base, "OPENAI_API_KEY": KEY}
        project.snakemake(*ONLY)
        labels = read_labels(project.folder / LABELS).values()
        assert [found.label for found in labels] == ["a planted label"] * N
        assert {(found.detection, found.status) for found in labels} == {(0.5, "ok")}
        n_requests = len(server.requests)
        label(project, price_in=3, requests_at_once=1)
        assert not project.planned(*ONLY).rules
        label(project, score_labels=False)
        project.snakemake(*ONLY)
        [first, *_] = read_labels(project.folder / LABELS).values()
        assert first.detection is None and len(server.requests) == n_requests, "answers are kept"
    for path in project.folder.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_pages_wait_for_labels(project: Project) -> None:
    label(project)
    project.environment = {"OPENAI_BASE_URL": "http://127.0.0.1:1/v1"}
    printed = project.snakemake("--dry-run")
    [browse] = re.findall(r"^rule browse:\n(?:    .*\n)+", printed, re.MULTILINE)
    assert LABELS in browse
    label(project, label_features=False)
    jobs = project.planned()
    assert jobs.rules["browse"] == 1 and not jobs.rules["label"]
