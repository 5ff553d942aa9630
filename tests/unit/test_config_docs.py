"""The schema and the documentation are those that the settings make, and the limits are kept."""

import dataclasses
import inspect
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
import yaml

from sae_core.models.model_sources import FetchConfig, SourceConfig
from sae_core.sae.config import TAGS, SAEConfig, SAEType
from sae_core.sae.kinds import KINDS
from sae_core.train_config import DataConfig, RunConfig, RuntimeConfig, TrainingConfig
from sae_core.utils import cli
from sae_core.utils.errors import SAEError
from sae_core.utils.limits import Filled, InConfiguration, Limits, Pattern, annotations
from sae_core.workflow import config_docs
from sae_core.workflow.config_files import read_file
from sae_core.workflow.config_schema import check
from sae_core.workflow.config_sections import (
    MODELS,
    SECTIONS,
    SOURCE,
    ChapterKeys,
    ModelKeys,
    docstrings,
    keys,
)
from sae_core.workflow.config_words import KEYS as KEYS_OF_OPTIONS
from sae_core.workflow.config_words import in_config_words
from sae_core.workflow.workflow_config import load_plan, save_config

ROOT = Path(__file__).resolve().parents[2]
SCHEMA_FILE = ROOT / "workflow/schemas/config.schema.yaml"
README = ROOT / "config/README.md"
SCHEMA = config_docs.schema()
GROUPS = {field.default_factory for field in dataclasses.fields(RunConfig)}
SETTINGS = {kind for section in SECTIONS.values() for kind in section.settings}

STEP = 1e-6
"""How far outside its range a number is tried."""

Case = tuple[Any, bool]
"""A value, and whether it is allowed."""


def edges(limits: Limits, step: float) -> Iterator[Case]:
    """The numbers at, and a step outside of, each end of a range."""
    for end, outwards in ((limits.minimum, -step), (limits.maximum, step)):
        if end is not None:
            yield from ((end, True), (end + outwards, False))
    for end, outwards in ((limits.exclusive_minimum, -step), (limits.exclusive_maximum, step)):
        if end is not None:
            yield from ((end - outwards, True), (end, False))


def cases(hint: Any, in_file: bool) -> Iterator[Case]:
    """What to try of a type: the ends of its ranges, what is empty, and a text of another look."""
    kind, parts, marks = get_origin(hint), get_args(hint), getattr(hint, "__metadata__", ())
    own = [mark.limits for mark in marks if in_file and isinstance(mark, InConfiguration)]
    for mark in own or marks:
        if isinstance(mark, Limits):
            yield from edges(mark, 1 if parts[0] is int else STEP)
        elif isinstance(mark, Pattern):
            yield "another look", False
        elif isinstance(mark, Filled) and parts[0] is not Path:
            yield {str: "", dict: {}}.get(get_origin(parts[0]) or parts[0], []), False
    for part in parts if kind in (Annotated, Union, UnionType) else ():
        yield from cases(part, in_file)
    if kind in (tuple, dict):
        for value, is_allowed in cases(parts[-1] if kind is dict else parts[0], in_file):
            yield ({"a": value} if kind is dict else [value]), is_allowed


def refusal(what: Callable[[], Any]) -> str:
    """What is said of something, if it is refused."""
    try:
        what()
    except SAEError as error:
        assert "\n" not in str(error)
        return str(error)
    return ""


def configuration(section: str, key: str, value: Any) -> dict[str, Any]:
    """A configuration in which a key of a section has that value."""
    config: dict[str, Any] = {"chapters": {"folders": {"a": "b"}}, "models": [{"name": "m"}]}
    if section == MODELS:
        config["models"][0][key] = value
    elif section == SOURCE:
        config["models"][0]["source"] = {key: value}
    else:
        config.setdefault(section, {})[key] = value
    return config


def place(section: str, key: str) -> str:
    """Where a key is in that configuration."""
    return f"config: {section.replace('[]', '[0]')}.{key}"


def test_what_is_committed_is_what_the_settings_make() -> None:
    assert SCHEMA_FILE.read_text(encoding="utf-8") == config_docs.schema_text(), "run `make docs`"
    text = README.read_text(encoding="utf-8")
    assert text == config_docs.with_tables(text), "run `make docs`"
    assert set(re.findall("made by make docs: (\\S+) -->", text)) == set(SECTIONS)


def test_what_is_made_does_not_depend_on_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_PROJECT", "WANDB_ENTITY", "WANDB_MODE", "SAE_HF_REPO_ID"):
        monkeypatch.setenv(name, "disabled")
    text = README.read_text(encoding="utf-8")
    assert text == config_docs.with_tables(text)


def test_the_configuration_keeps_every_limit() -> None:
    tried = 0
    for section in SECTIONS:
        for key in keys(section):
            for value, is_allowed in cases(key.hint, in_file=True):
                said = refusal(lambda: check(configuration(section, key.name, value), SCHEMA))  # noqa: B023
                assert said.startswith(place(section, key.name)) != is_allowed, (key.name, value)
                tried += 1
    assert tried > 100


def test_the_command_line_keeps_every_limit() -> None:
    tried = 0
    for settings in {*SETTINGS, *GROUPS} - {ChapterKeys, ModelKeys}:
        for name, hint in annotations(settings).items():
            option = f"--{name.replace('_', '-')}"
            for value, is_allowed in cases(hint, in_file=False):
                words = [option, *map(str, value if isinstance(value, list) else [value])]
                said = refusal(lambda: cli.parse(settings, "", words))  # noqa: B023
                is_refused = said.startswith(f"{option} ") and "must " in said
                assert is_refused != is_allowed, (words, said)
                tried += 1
    assert tried > 80


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_with_a_limit_is_finite(value: float) -> None:
    assert "--lr" in refusal(lambda: TrainingConfig(lr=value))
    assert "--recon-weight" in refusal(lambda: TrainingConfig(recon_weight=value))


def test_messages_name_options_by_their_keys() -> None:
    for option, place in KEYS_OF_OPTIONS.items():
        section, _, name = place.rpartition(".")
        assert name in {key.name for key in keys(section)}, option
    assert in_config_words("error: --hook-layer 9: try --no-use-block-mse, or -n --texts x") == (
        "error: models[].layers 9: try end_to_end.use_block_mse: false, or -n --texts x"
    )


def test_a_model_without_further_keys_has_the_documented_defaults() -> None:
    plan = load_plan({"chapters": {"folders": {"a": "b"}}, "models": [{"name": "m"}]}, SCHEMA_FILE)
    [model] = plan.models.values()
    assert model.source == SourceConfig()
    assert model.layers == ("middle",)
    assert model.saes == (SAEConfig(),)
    assert (model.data, model.runtime) == (DataConfig(), RuntimeConfig())


def test_the_kinds_are_those_of_the_registry_the_settings_and_the_readme() -> None:
    """One registry; the README's table has each kind's tag, and the paper that its file names."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `([\w<>]+)` \|.*\[(\d{4}\.\d{5})\]", text, re.MULTILINE)
    tags = {kind: tag.replace("<k>", "{k}") for kind, tag, _ in rows}
    assert tags == TAGS and list(tags) == list(KINDS)
    assert list(KINDS) == list(get_args(SAEType))
    for kind, _, paper in rows:
        module = inspect.getmodule(KINDS[kind])
        assert module is not None and module.__name__ == f"sae_core.sae.kinds.{kind}"
        assert f"arXiv {paper}" in str(module.__doc__)


@pytest.mark.parametrize("settings", sorted(SETTINGS | GROUPS, key=str))
def test_every_setting_has_a_docstring(settings: type) -> None:
    assert set(annotations(settings)) == set(docstrings(settings))


def test_fetching_documents_its_own_settings() -> None:
    assert set(annotations(FetchConfig)) - {"source"} == set(docstrings(FetchConfig))


def test_the_docstrings_are_the_command_lines_help(run: Callable[..., Any]) -> None:
    printed = run(
        "sae_core/model_training/single_sae_training.py", "--help", env={"COLUMNS": "100"}
    ).stdout
    shown = " ".join(re.sub("[│╭╮╰╯─]", " ", printed).split())
    for settings in GROUPS:
        for name, text in docstrings(settings).items():
            assert f"--{name.replace('_', '-')}" in shown
            assert text in shown, name


@pytest.mark.parametrize("name", ["config.yaml", "demo.yaml", "all_layers.yaml"])
def test_the_shipped_configurations_load(name: str) -> None:
    assert load_plan(read_file(ROOT / "config" / name), SCHEMA_FILE).models


def test_the_example_in_the_documentation_loads() -> None:
    text = README.read_text(encoding="utf-8")
    [example] = re.findall(r"```yaml\n(.+?)```", text, flags=re.DOTALL)
    config = {"chapters": {"folders": {"a": "b"}}, **yaml.safe_load(example)}
    [model] = load_plan(config, SCHEMA_FILE).models.values()
    assert len({run.name for run in model.runs(28)}) == 4


def test_a_configuration_that_was_run_can_be_run_again(tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "config/demo.yaml").read_text(encoding="utf-8"))
    config["chapters"]["folders"] = OrderedDict(config["chapters"]["folders"])
    path = tmp_path / "results/config.yaml"
    config = load_plan(config, SCHEMA_FILE).config
    save_config(config, path)
    stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert load_plan(stored, SCHEMA_FILE) == load_plan(config, SCHEMA_FILE)
    assert list(stored["chapters"]["folders"]) == ["physics", "chemistry", "biology"]
    before = path.stat().st_mtime_ns
    save_config(config, path)
    assert path.stat().st_mtime_ns == before, "what has not changed is not written"
