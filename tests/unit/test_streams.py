"""Which SAEs a job without a store trains: those that are new or changed, and no others."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running import ROOT

from sae_core.utils.errors import SAEError
from sae_core.workflow.streams import (
    StreamNote,
    notes,
    sae_options,
    settings_sha256,
    streams,
)
from sae_core.workflow.workflow_config import Plan, load_plan

SCHEMA = ROOT / "workflow/schemas/config.schema.yaml"
N_LAYERS = 9

Grouped = dict[str, set[str]]


def plan(saes: list[dict[str, Any]], layers: Any = (0, 2, 5, 7), **sections: Any) -> Plan:
    model = {"name": "m", "source": {"path": "x"}, "layers": list(layers), "saes": saes}
    config = {"chapters": {"folders": {"a": "a"}}, "harvest": {"store": False}, "models": [model]}
    return load_plan({**config, **sections}, SCHEMA)


class Done:
    """What the jobs of earlier configurations have left."""

    def __init__(self) -> None:
        self.notes: dict[str, StreamNote] = {}

    def run(self, plan: Plan, lost: Callable[[str], bool] = lambda run: False) -> Grouped:
        """The SAEs that each job trains, and then note it; named as `<layer>.<kind>`."""
        [model] = plan.models.values()
        was_there = set(self.notes)
        found = streams(
            plan, model, N_LAYERS, self.notes, lambda run, _: run in was_there and not lost(run)
        )
        trained: Grouped = {}
        for stream, runs in found.items():
            for run in runs:
                note = StreamNote(stream, settings_sha256(plan, run))
                if self.notes.get(run.name) != note or lost(run.name):
                    trained.setdefault(stream, set()).add(f"{run.layer}.{run.sae.tag}")
                    self.notes[run.name] = note
        return trained


def sets(trained: Grouped) -> list[set[str]]:
    return list(trained.values())


TWO = [{"topk": 4}, {"topk": 8}]


def test_one_job_makes_all_saes_of_a_model() -> None:
    [stream] = Done().run(plan(TWO)).items()
    assert len(stream[1]) == 8 and len(stream[0]) == 12


@pytest.mark.parametrize("jobs", [1, 3, 4])
def test_jobs_share_the_layers(jobs: int) -> None:
    made = sets(Done().run(plan(TWO, harvest={"store": False, "layers_per_job": jobs})))
    expected = [(0, 2, 5, 7)[first : first + jobs] for first in range(0, 4, jobs)]
    tags = ("btop4sae", "btop8sae")
    assert made == [{f"{layer}.{tag}" for layer in some for tag in tags} for some in expected]


@pytest.mark.parametrize(
    ("changed", "trained"),
    [
        (
            plan([{"topk": 4}, {"topk": 8, "aux_penalty": 0.5}], [0, 2]),
            ["0.btop8sae", "2.btop8sae"],
        ),
        (plan([*TWO, {"topk": 16}], [0, 2]), ["0.btop16sae", "2.btop16sae"]),
        (plan(TWO, [0, 2, "middle"]), ["4.btop4sae", "4.btop8sae"]),
        (plan([{"topk": 8}], [2]), []),
        (plan(TWO, [0, 2], runtime={"batch_size": 3}), []),
    ],
)
def test_what_changes_is_trained_alone(changed: Plan, trained: list[str]) -> None:
    done = Done()
    [first] = done.run(plan(TWO, [0, 2]))
    made = done.run(changed)
    assert sorted(set().union(*made.values())) == trained
    assert first not in made
    assert done.run(changed) == {}


@pytest.mark.parametrize(
    "section",
    [
        {"training": {"num_epochs": 1}},
        {"windows": {"seed": 1}},
        {"windows": {"excluded_tokens": ["<bos>"]}},
        {"end_to_end": {"use_end_to_end": False}},
    ],
)
def test_what_concerns_all_trains_all(section: dict[str, Any]) -> None:
    done = Done()
    done.run(plan(TWO))
    [made] = sets(done.run(plan(TWO, **section)))
    assert len(made) == 8


def test_one_that_is_deleted_or_changed_back_is_trained_alone() -> None:
    done = Done()
    done.run(plan(TWO, [0]))
    assert sets(done.run(plan(TWO, [0]), lost=lambda run: "btop8" in run)) == [{"0.btop8sae"}]
    done.run(plan([{"topk": 4}, {"topk": 8, "aux_penalty": 0.5}], [0]))
    assert sets(done.run(plan(TWO, [0]))) == [{"0.btop8sae"}]


def test_a_job_has_no_more_saes_than_its_command_can_name() -> None:
    many = plan([{"topk": k} for k in range(1, 301)], [0, 2, 5])
    [model] = many.models.values()
    found = streams(many, model, None, {}, lambda *_: False)
    assert [len(runs) for runs in found.values()] == [500, 400]
    words = [f"{sae_options(run)} {settings_sha256(many, run)}" for run in found.popitem()[1]]
    assert max(map(len, words)) * 500 < 100_000


def test_a_stream_that_ends_does_not_change_the_others() -> None:
    """Snakemake asks again, for instance in the process that runs a job on a cluster."""
    asked = plan(TWO, harvest={"store": False, "layers_per_job": 1})
    [model] = asked.models.values()
    first = streams(asked, model, None, {}, lambda *_: False)
    second, *_ = list(first)[1:]
    noted = {run.name: StreamNote(second, settings_sha256(asked, run)) for run in first[second]}
    assert streams(asked, model, None, noted, lambda *_: True) == first


def test_an_sae_that_begins_with_another_comes_after_it() -> None:
    name = "m.blocks.{layer}.hook_resid_post.btop4sae.exp4"
    made = sets(Done().run(plan([*TWO, {"topk": 4, "init_from": name}], [0])))
    assert made == [{"0.btop4sae", "0.btop8sae"}, {"0.btop4sae-ft"}]


def test_a_damaged_note_is_named(tmp_path: Path) -> None:
    note = {"stream": "a", "settings": "b"}
    (tmp_path / "m.blocks.0.x.exp4.json").write_text(json.dumps(note))
    assert notes(tmp_path) == {"m.blocks.0.x.exp4": StreamNote(**note)}
    (tmp_path / "other.json").write_text("{")
    with pytest.raises(SAEError, match=r"other.json: not a readable note .* delete it"):
        notes(tmp_path)


@pytest.mark.parametrize(
    ("harvest", "message"),
    [
        ({"layers_per_job": 2}, "harvest: layers_per_job is for"),
        ({"store": False, "passes": 2}, "passes and harvest_jobs are for a store"),
    ],
)
def test_keys_that_do_not_fit_together(harvest: dict[str, Any], message: str) -> None:
    with pytest.raises(SAEError, match=message):
        plan(TWO, harvest=harvest)


def test_several_gpus_are_for_several_jobs() -> None:
    with pytest.raises(SAEError, match="gpus 2: without a store .* harvest.layers_per_job"):
        plan(TWO, runtime={"gpus": 2})
