"""The workflow with labels by a language model, which is a look-alike on this machine."""

from pathlib import Path
from typing import Any

import pytest
from minichat import KEY, MiniChat, kind
from project import Project

from sae_core.labelling.label_files import read_labels

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("completed")]

N = 3
RUN = "tiny.blocks.2.hook_resid_post.btop4sae.exp2"


def answer(body: dict[str, Any]) -> dict[str, Any]:
    if kind(body) == "label":
        return {"label": "a planted label", "description": "what it is", "confidence": 0.5}
    values = body["response_format"]["json_schema"]["schema"]["properties"]["active"]
    assert values == {"type": "array", "items": {"type": "boolean"}}
    n = sum(line[:1].isdigit() for line in body["messages"][1]["content"].splitlines())
    return {"active": [True] * n}


def label(project: Project, **settings: Any) -> None:
    """Configure labels of a few features."""
    section = {"label_features": True, "labeller": "m", "labelled_features": N, **settings}
    project.configure(project.config | {"labelling": section})


def test_labels_in_the_workflow(completed_copy: Project) -> None:
    project = completed_copy
    label(project)
    said = project.snakemake(ok=False)
    assert "labelling.labeller" in said and "set OPENAI_BASE_URL" in said, "before any job"
    with MiniChat(answer) as server:
        project.environment = {"OPENAI_BASE_URL": server.base, "OPENAI_API_KEY": KEY}
        jobs = project.planned()
        assert dict(jobs.rules) == {"label": 4, "browse": 4, "all": 1}
        project.snakemake()
        labels = read_labels(project.folder / f"results/labels/{RUN}.jsonl").values()
        assert [found.label for found in labels] == ["a planted label"] * N
        assert {found.status for found in labels} == {"ok"}
        n = len(server.requests)
        label(project, price_in=3, requests_at_once=1)
        assert not project.planned().rules
        label(project, score_labels=False)
        project.snakemake()
        assert len(server.requests) == n, "the answers were kept"
    for path in Path(project.folder).rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_without_labels_there_is_no_job_for_them(completed: Project) -> None:
    assert not completed.planned("--forceall").rules["label"]
