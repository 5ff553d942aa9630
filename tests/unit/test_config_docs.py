"""The configuration's schema, its documentation and the settings dataclasses agree."""

import ast
import dataclasses
import inspect
import re
import textwrap
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import pytest
import yaml

from sae_core.config_files import read_file
from sae_core.config_words import KEYS as KEYS_OF_OPTIONS
from sae_core.config_words import in_config_words
from sae_core.data_processing.textbook_process import ProcessConfig
from sae_core.kinds import KINDS
from sae_core.model_sources import FetchConfig, SourceConfig
from sae_core.sae_config import TAGS, SAEConfig
from sae_core.train_config import (
    DataConfig,
    EndToEndConfig,
    EvaluationConfig,
    FeaturesConfig,
    HarvestConfig,
    HookConfig,
    ModelConfig,
    PublishingConfig,
    RunConfig,
    RuntimeConfig,
    TrackingConfig,
    TrainingConfig,
)
from sae_core.workflow_config import load_plan, save_config

ROOT = Path(__file__).resolve().parents[2]
SCHEMA_FILE = ROOT / "workflow/schemas/config.schema.yaml"
SCHEMA = yaml.safe_load(SCHEMA_FILE.read_text(encoding="utf-8"))

SECTIONS: dict[str, type] = {
    "chapters": ProcessConfig,
    "windows": DataConfig,
    "sae": SAEConfig,
    "training": TrainingConfig,
    "end_to_end": EndToEndConfig,
    "harvest": HarvestConfig,
    "evaluation": EvaluationConfig,
    "features": FeaturesConfig,
    "runtime": RuntimeConfig,
    "source": SourceConfig,
    "tracking": TrackingConfig,
    "publishing": PublishingConfig,
}
"""The settings behind each section; `models` has keys of several."""

OWN_KEYS = {"name", "source", "layers", "saes"}
"""Keys of a model that are no field of a settings dataclass."""

RENAMED = {"model_name", "model_id", "hook_layer"}
"""Fields whose place in a model's entry is taken by `name` and `layers`."""

OVERRIDES = {
    "max_text_length": "windows",
    "gpus": "runtime",
    "batch_size": "runtime",
    "activation_batch_size": "runtime",
    "hf_base_model": "publishing",
}
"""Keys of a model whose default is that of a section."""

NO_OPTION = {"output", "subjects"}
"""Fields of `ProcessConfig` that the workflow sets itself, or from the keys of `folders`."""


LIMITS = {
    "minimum": "at least",
    "maximum": "at most",
    "exclusiveMinimum": "above",
    "exclusiveMaximum": "below",
}
"""How the documentation calls the limits of a number."""


REQUIRED = {
    *(("chapters", key) for key in SCHEMA["properties"]["chapters"]["required"]),
    *(("models", key) for key in SCHEMA["properties"]["models"]["items"]["required"]),
}

MODEL_DEFAULTS = {"source": {}, "layers": "middle", "saes": [{}]}
"""What `load_plan` takes for a model's own keys; a test below compares."""


class Row(NamedTuple):
    """A line of a table of the documentation."""

    values: str
    default: str
    meaning: str


def resolve(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema with its reference followed."""
    if "$ref" in schema:
        return SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]]
    return schema


def sections() -> dict[str, dict[str, Any]]:
    """The properties of every section of the schema, and of a model's entry and its source."""
    found = {name: resolve(section) for name, section in SCHEMA["properties"].items()}
    found["models"] = found["models"]["items"]
    found["source"] = found["models"]["properties"]["source"]
    return {
        name: {key: resolve(value) for key, value in section["properties"].items()}
        for name, section in found.items()
    }


def read_tables() -> dict[str, dict[str, Row]]:
    """The tables of config/README.md, by the name in the heading above each."""
    tables: dict[str, dict[str, Row]] = {}
    section = ""
    for line in (ROOT / "config/README.md").read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"#+ .*?`(\w+)`", line):
            section = heading[1]
        elif row := re.match(r"\| `(\w+)` \| (.+) \|$", line):
            tables.setdefault(section, {})[row[1]] = Row(*row[2].split(" | ")[:3])
    return tables


PROPERTIES, TABLES = sections(), read_tables()
KEYS = [(section, key) for section, keys in PROPERTIES.items() for key in keys]


def settings_of(section: str, key: str) -> type | None:
    """The dataclass that a key of the configuration is a field of."""
    if section != "models":
        return SECTIONS[section]
    kinds = (ModelConfig, HookConfig, DataConfig, RuntimeConfig, PublishingConfig)
    return next((kind for kind in kinds if key in names_of(kind)), None)


def names_of(settings: type) -> set[str]:
    return {field.name for field in dataclasses.fields(settings)}


def default_of(settings: type, key: str) -> Any:
    field = settings.__dataclass_fields__[key]
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def choices_of(settings: type, key: str) -> list[str]:
    """The strings that a field's `Literal` allows."""

    def walk(hint: Any) -> list[str]:
        if get_origin(hint) is Literal:
            return [value for value in get_args(hint) if isinstance(value, str)]
        return [value for part in get_args(hint) for value in walk(part)]

    return walk(get_type_hints(settings)[key])


def words_of(schema: dict[str, Any]) -> list[str]:
    """The strings that a key's schema allows, where they are few: an enum, or `^word$`."""
    return schema.get("enum") or re.findall(r"^\^(\w+)\$$", schema.get("pattern", ""))


def docstrings_of(settings: type) -> dict[str, str]:
    """The string under each field, in one line."""
    found: dict[str, str] = {}
    for kind in reversed(settings.__mro__[:-1]):
        [tree] = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(tree, ast.ClassDef)
        for field, text in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return found


def test_the_sections_have_the_fields_of_their_settings() -> None:
    assert set(SECTIONS) | {"models"} == set(PROPERTIES)
    for section, settings in SECTIONS.items():
        expected = names_of(settings) - (NO_OPTION if section == "chapters" else set())
        assert set(PROPERTIES[section]) == expected, section


def test_a_model_has_the_fields_of_model_and_hook_and_the_overrides() -> None:
    fields = (names_of(ModelConfig) | names_of(HookConfig)) - RENAMED
    assert set(PROPERTIES["models"]) == fields | OWN_KEYS | set(OVERRIDES)


def test_every_key_is_documented_and_no_other() -> None:
    documented = {section: set(rows) for section, rows in TABLES.items()}
    assert documented == {section: set(keys) for section, keys in PROPERTIES.items()}


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_the_documented_default_is_the_one_in_the_code(
    section: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("WANDB_PROJECT", "WANDB_ENTITY", "SAE_HF_REPO_ID"):
        monkeypatch.delenv(variable, raising=False)
    cell = TABLES[section][key].default
    settings = settings_of(section, key)
    if (section, key) in REQUIRED:
        assert cell == "required"
    elif section == "models" and key in OVERRIDES:
        assert cell == f"as `{OVERRIDES[key]}`"
    elif settings is None:
        assert yaml.safe_load(cell.strip("`")) == MODEL_DEFAULTS[key]
    else:
        documented, actual = yaml.safe_load(cell.strip("`")), default_of(settings, key)
        actual = list(actual) if isinstance(actual, tuple) else actual
        assert (documented, type(documented)) == (actual, type(actual))


def test_messages_name_options_by_their_keys() -> None:
    for option, place in KEYS_OF_OPTIONS.items():
        section, _, key = place.rpartition(".")
        known = {"models[]": "models", "models[].source": "source"}.get(section, section)
        assert key in PROPERTIES[known], option
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


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_the_documented_values_are_those_of_the_schema(section: str, key: str) -> None:
    schema, values = PROPERTIES[section][key], TABLES[section][key].values
    limits = schema | schema.get("items", {})
    for name, words in LIMITS.items():
        assert re.findall(rf"{words} (\S+?)\b", values) == [str(limits.get(name))] * (
            name in limits
        )
    for kind in ("integer", "number", "boolean"):
        assert (kind in limits["type"]) == (kind in values)
    if words := words_of(schema):
        assert re.findall(r"`(\w+)`", values) == words


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_the_choices_are_those_of_the_dataclass(section: str, key: str) -> None:
    if settings := settings_of(section, key):
        assert words_of(PROPERTIES[section][key]) == choices_of(settings, key)


def test_the_kinds_are_those_of_registry_options_schema_and_readme() -> None:
    """One registry; the README's table has each kind's tag, and the paper that its file names."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `([\w<>]+)` \|.*\[(\d{4}\.\d{5})\]", text, re.MULTILINE)
    tags = {kind: tag.replace("<k>", "{k}") for kind, tag, _ in rows}
    assert tags == TAGS and list(tags) == list(KINDS)
    assert list(KINDS) == choices_of(SAEConfig, "sae_type") == PROPERTIES["sae"]["sae_type"]["enum"]
    for kind, _, paper in rows:
        module = inspect.getmodule(KINDS[kind])
        assert module is not None and module.__name__ == f"sae_core.kinds.{kind}"
        assert f"arXiv {paper}" in str(module.__doc__)


GROUPS = [field.default_factory for field in dataclasses.fields(RunConfig)]


@pytest.mark.parametrize("settings", sorted({*GROUPS, *SECTIONS.values()}, key=str))
def test_every_setting_has_a_docstring(settings: type) -> None:
    assert names_of(settings) == set(docstrings_of(settings))


def test_fetching_documents_its_own_settings() -> None:
    assert names_of(FetchConfig) - {"source"} == set(docstrings_of(FetchConfig))


def test_the_docstrings_are_the_command_lines_help(run: Callable[..., Any]) -> None:
    printed = run(
        "sae_core/model_training/single_sae_training.py", "--help", env={"COLUMNS": "100"}
    ).stdout
    shown = " ".join(re.sub("[│╭╮╰╯─]", " ", printed).split())
    for settings in GROUPS:
        for name, text in docstrings_of(settings).items():
            assert f"--{name.replace('_', '-')}" in shown
            assert text in shown, name


@pytest.mark.parametrize("name", ["config.yaml", "demo.yaml", "all_layers.yaml"])
def test_the_shipped_configurations_load(name: str) -> None:
    assert load_plan(read_file(ROOT / "config" / name), SCHEMA_FILE).models


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_null_is_allowed_where_it_is_documented(section: str, key: str) -> None:
    row, kinds = TABLES[section][key], PROPERTIES[section][key]["type"]
    assert ("null" in row.values) == ("null" in kinds)
    assert "null" in row.values or row.default != "`null`"


def test_the_example_in_the_documentation_loads() -> None:
    text = (ROOT / "config/README.md").read_text(encoding="utf-8")
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
