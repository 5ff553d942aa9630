"""The records of the benchmark of quality, and the tables that are made of them."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/benchmarks"))

import quality  # noqa: E402
import recipe_tables  # noqa: E402
from our_training import OURS, Harvest, automatic, in_steps  # noqa: E402
from recipe_tables import Idea, auto_table, bests_table, contenders_table, ideas_table  # noqa: E402
from sae_figures import Trained, at_l0  # noqa: E402
from trial_records import Figures, Record, Records, Settings  # noqa: E402

from sae_core.activations.shards import harvest  # noqa: E402
from sae_core.activations.token_windows import TokenWindows  # noqa: E402
from sae_core.models.language_model import Hook, LanguageModel  # noqa: E402

SETTINGS = Settings("ours", "blocks.9.hook_resid_post", 32, 4608, 1024, 3e-3, 0, 10**6, "some", 9)
FIGURES = Figures(0.2, 0.05, 0.21, 31.0, 0.19, 12.0)


def record(fvu: float, calibration_fvu: float, **settings: object) -> Record:
    figures = replace(FIGURES, fvu=fvu, calibration_fvu=calibration_fvu)
    return Record(replace(SETTINGS, **settings), figures, "code", "today")  # type: ignore[arg-type]


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:]]


def test_a_record_stands_for_the_same_settings_and_code_alone(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    Records(path).add(record(0.2, 0.2))
    read = Records(path)
    assert read.find(SETTINGS, "code") == record(0.2, 0.2)
    assert read.find(SETTINGS, "other code") is None
    assert read.find(replace(SETTINGS, lr=6e-3), "code") is None
    read.add(replace(record(0.1, 0.1), code="other code"))
    assert [found.code for found in Records(path).all()] == ["other code"]


def test_the_rate_is_chosen_by_the_calibration_tokens_over_all_seeds() -> None:
    records = [
        record(0.30, 0.10, lr=1e-3, seed=0),
        record(0.32, 0.30, lr=1e-3, seed=1),
        record(0.20, 0.15, lr=2e-3, seed=0),
        record(0.22, 0.17, lr=2e-3, seed=1),
        record(0.01, 0.01, lr=3e-3, seed=0),  # not as many seeds
        record(0.42, 0.42, contender="other"),
    ]
    ours, other = cells(contenders_table(records))
    assert ours[5:8] == ["ours", "0.002", "0.2100"]
    assert other[5:8] == ["other", "0.003", "0.4200"] and other[-1] == "0.500"


def test_a_contender_stands_at_its_best_step_size() -> None:
    records = [
        record(0.18, 0.18, contender="ours, active_adam", tokens_per_step=256),
        record(0.17, 0.19, contender="ours, active_adam", tokens_per_step=512),
        record(0.25, 0.21, contender="a peer", tokens_per_step=512, lr=1e-3),
        record(0.24, 0.20, contender="a peer", tokens_per_step=1024, lr=2e-3),
        record(0.10, 0.30, contender="a peer", tokens_per_step=1024, lr=3e-3),
        record(0.10, 0.10, contender="ours, active_adam", k=64),  # no peer there
    ]
    ours, peer = cells(bests_table(records))
    assert ours[4:] == ["ours, active_adam", "2", "256", "0.003", "0.1800", "5.0%", ""]
    assert peer[4:] == ["a peer", "3", "1,024", "0.002", "0.2400", "5.0%", "25.0%"]


def test_an_idea_stands_beside_the_recipe_on_the_same_seeds() -> None:
    records = [
        record(0.20, 0.20, contender="recipe", seed=0),
        record(0.90, 0.90, contender="recipe", seed=1),
        record(0.19, 0.19, contender="idea", seed=0),
    ]
    ideas = [Idea("idea", "a change", "a paper", "kept"), Idea("", "another", "", "not tried")]
    first, second = cells(ideas_table(ideas, records))
    assert first[0] == "a change (a paper)" and first[-1] == "kept"
    assert first[6:9] == ["0.1900", "0.2000", "5.0%"]
    assert second == ["another", *[""] * 10, "not tried"]


@pytest.mark.parametrize("contender", ["ours", "ours, active_adam"])
def test_auto_stands_beside_the_best_of_the_others(contender: str) -> None:
    size, lr = automatic(OURS[contender], 576, 4608, 32, 10**6)
    records = [
        record(0.202, 0.20, tokens_per_step=size, lr=lr, seed=0),
        record(0.300, 0.30, tokens_per_step=size, lr=lr, seed=1),  # no other has this seed
        record(0.200, 0.10, tokens_per_step=512, lr=1e-3, seed=0),
        record(0.100, 0.30, tokens_per_step=512, lr=2e-3, seed=0),  # not by the calibration tokens
        record(0.200, 0.20, tokens_per_step=size, lr=lr, k=64),  # alone
    ]
    ours = [replace(r, settings=replace(r.settings, contender=contender)) for r in records]
    ours.append(record(0.001, 0.01, contender="other"))
    [line] = cells(auto_table(ours))
    assert line[0] == contender and line[5:8] == [f"{size:,}", f"{lr:.2g}", "0.2020"]
    assert line[10:13] == ["512", "0.001", "0.2000"] and line[-2:] == ["2", "1.010"]


def test_the_page_has_the_tables_of_the_records() -> None:
    page = recipe_tables.RECIPE.read_text(encoding="utf-8")
    assert recipe_tables.with_tables(page, Records().all()) == page
    with pytest.raises(KeyError):
        recipe_tables.with_tables("<!-- made by make recipe: x -->\n<!-- end -->", [])


def test_figures_at_an_l0_in_closed_form() -> None:
    x = torch.tensor([[3.0, 1.0], [1.0, 2.0], [-1.0, -3.0], [-3.0, 0.0]])
    positive = Trained(lambda x: x, lambda code: code, 0.0)
    found = at_l0(positive, x, 0.5)  # the 3 and the 2 are kept: 1 + 1 + 10 + 9 over 34
    assert found == (pytest.approx(21 / 34), 0.5, 0.0)
    assert at_l0(positive, x, 0.25).dead == 0.5


def test_a_training_is_done_once(
    tmp_path: Path,
    language_model: LanguageModel,
    windows: TokenWindows,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shard, hook = tmp_path / "shard", "blocks.1.hook_resid_post"
    harvest(language_model, windows, [Hook.parse(hook)], shard, batch_size=8, passes=1)
    data = Harvest((shard,), hook)
    features = 4 * data.load(100, 0).held_out.shape[1]
    settings = Settings("ours", hook, 4, features, 512, 3e-3, 0, 1000, data.identity, 9)

    def again() -> Record:
        bench = quality.Bench((shard,), Records(tmp_path / "records.jsonl"))
        return bench.record(settings)

    first = again()
    assert 0 < first.figures.fvu < 1.5 and 0 < first.figures.own_l0 < 8
    monkeypatch.setattr(quality.Bench, "_data", lambda *_: pytest.fail("a training"))
    assert again() == first


def test_smaller_steps_have_the_same_tokens() -> None:
    batches = [torch.arange(4090.0)[:, None], torch.arange(4096.0)[:, None]]
    cut = in_steps(quality.Data(batches, batches[0], batches[0]), 1024).batches
    assert [len(batch) for batch in cut] == [1023, 1023, 1023, 1021, *[1024] * 4]
    assert torch.equal(torch.cat(cut), torch.cat(batches))
