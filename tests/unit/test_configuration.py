"""Configuration files mean what they say, or are refused in one line that says what to write."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from running import ROOT

from sae_core.utils.errors import SAEError
from sae_core.workflow.config_files import MOST_VALUES, read_config, read_file
from sae_core.workflow.workflow_config import Plan, load_plan, save_config

SCHEMA = ROOT / "workflow/schemas/config.schema.yaml"
CHAPTERS = "chapters: {folders: {a: a}}\n"
MODELS = "models: [{name: m, source: {path: x}, layers: [1]}]\n"
BASE = CHAPTERS + MODELS


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Plan]:
    """The plan of a file with that text, and of what the command line adds."""

    def load(text: str, overrides: dict[str, Any] | None = None) -> Plan:
        file = tmp_path / "file.yaml"
        file.write_text(text, encoding="utf-8")
        return load_plan(read_config([file], overrides or {}), SCHEMA)

    return load


@pytest.fixture
def refused(load: Callable[..., Plan]) -> Callable[..., str]:
    """What is said of a file with that text."""

    def refused(text: str, overrides: dict[str, Any] | None = None) -> str:
        with pytest.raises(SAEError) as caught:
            load(text, overrides)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return refused


TINY: dict[str, Any] = {
    "chapters": {"folders": {"a": "a"}},
    "sae": {"sae_expansion": 2},
    "training": {"num_epochs": 2},
    "models": [
        {
            "name": "tiny",
            "source": {"path": "x"},
            "layers": [2, "middle"],
            "saes": [{"topk": 4}, {"topk": 8}],
        }
    ],
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(trainng={}), "top level: unknown key trainng; did you mean training?"),
        (lambda c: c["training"].update(lrate=1), "training: unknown key lrate"),
        (lambda c: c["models"][0].update(layer=3), "models[0]: unknown key layer"),
        (lambda c: c["training"].update(num_epochs="many"), "training.num_epochs: 'many'"),
        (lambda c: c["models"][0].update(layers=[2, -1]), "models[0].layers[1]: -1"),
        (lambda c: c["models"][0].update(layers="center"), "models[0].layers: 'center'"),
        (lambda c: c["models"][0].update(layers=[]), "models[0].layers"),
        (lambda c: c["models"].append(dict(c["models"][0])), "models[1].name: 'tiny'"),
        (
            lambda c: c["models"][0].update(layers=[2], saes=[{"topk": 4}, {"topk": 4}]),
            "two SAEs are named tiny.blocks.2.hook_resid_post.btop4sae.exp2",
        ),
        (
            lambda c: c["models"][0].update(target_hook_name="hook_mlp_out"),
            "models[0]: target_hook_name hook_mlp_out: a transcoder goes from hook_name",
        ),
        (lambda c: c["models"][0].update(name="../up"), "models[0].name"),
        (lambda c: c["models"][0].update(source={"wheel": "a==1"}), "models[0].source"),
        (lambda c: c["sae"].update(topk=0), "sae.topk: 0"),
        (
            lambda c: c.update(end_to_end={"end_to_end_fraction": 0}),
            "end_to_end.end_to_end_fraction: 0",
        ),
        (
            lambda c: c.update(end_to_end={"use_logit_kl": False}),
            "end_to_end: use_end_to_end needs use_logit_kl or use_block_mse",
        ),
        (
            lambda c: c.update(tracking={"wandb_log_final_artifact": True}),
            "tracking: wandb_log_final_artifact needs wandb",
        ),
        (lambda c: c["models"][0].update(hf_base_model="x"), "hf_base_model x: not a repository"),
        (
            lambda c: c.update(publishing={"upload_to_hf": True, "hf_repo_id": None}),
            "publishing: upload_to_hf needs a repository: give hf_repo_id",
        ),
        (lambda c: c.pop("chapters"), "top level: the key chapters or corpus is missing"),
        (lambda c: c.pop("models"), "top level: the key models is missing"),
        (lambda c: c["models"][0].pop("name"), "models[0]: the key name is missing"),
    ],
)
def test_a_wrong_configuration_is_one_clear_line(
    refused: Callable[..., str], change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    config = json.loads(json.dumps(TINY))
    change(config)
    found = refused(yaml.safe_dump(config))
    assert found.startswith("config: ") and message in found


@pytest.mark.parametrize(
    ("written", "number"), [("1e-3", 0.001), ("1E5", 1e5), ("1e-2", 0.01), ("+.5", 0.5), ("2.", 2)]
)
def test_a_number_is_one_however_it_is_written(
    load: Callable[..., Plan], written: str, number: float
) -> None:
    plan = load(
        f"{CHAPTERS}models: [{{name: m, layers: [1], saes: [{{sparsity_penalty: {written}}}]}}]\n"
        f"training: {{lr: {written}, recon_weight: '{written}'}}\nsae: {{aux_penalty: {written}}}"
    )
    assert (plan.training.lr, plan.training.recon_weight) == (number, number)
    [sae] = plan.models["m"].saes
    assert (sae.sparsity_penalty, sae.aux_penalty) == (number, number)
    assert not isinstance(plan.config["training"]["lr"], str)


def test_a_whole_number_may_have_an_exponent(load: Callable[..., Plan]) -> None:
    sae = "sae: {topk: 1_0, n_tokens_to_dead: 1e6}"
    plan = load(f"{CHAPTERS}models: [{{name: m, layers: [2e0]}}]\n{sae}")
    [sae] = plan.models["m"].saes
    assert (sae.topk, sae.n_tokens_to_dead) == (10, 1_000_000)
    assert plan.models["m"].layers == (2,)


def test_values_of_the_command_line_come_last_and_are_read_alike(load: Callable[..., Plan]) -> None:
    """Snakemake makes text of every word inside a value of `--config`."""
    plan = load(
        BASE + "training: {num_epochs: 7, tokens_per_step: 512}\npublishing: {hf_license: mit}",
        {
            "training": {"lr": "1e-3", "num_epochs": "3"},
            "tracking": {"wandb": "true"},
            "publishing": {"hf_license": "null"},
            "models": [{"name": "n", "revision": "012", "layers": ["1", "middle"]}],
        },
    )
    training = plan.training
    assert (training.lr, training.num_epochs, training.tokens_per_step) == (0.001, 3, 512)
    assert plan.tracking.wandb is True and plan.publishing.hf_license is None
    assert plan.models["n"].layers == (1, "middle") and list(plan.models) == ["n"]
    assert plan.models["n"].model.revision == "012"


def test_every_documented_null_is_taken(load: Callable[..., Plan]) -> None:
    plan = load(
        f"{CHAPTERS}models: [{{name: m, revision: null, hf_base_model: ~, source: "
        "{path: null, wheel: null, sha256: null, gguf: null},"
        " saes: [{topk_aux: null, n_tokens_to_dead: null}]}]\n"
        "tracking: {wandb_entity: null, wandb_group: null, wandb_notes: }\n"
        "publishing: {hf_repo_id: null, hf_license: null, hf_base_model: null, hf_dataset: null}"
    )
    assert plan.models["m"].model.revision is None
    assert plan.models["m"].source.path is None


def test_keys_are_text(load: Callable[..., Plan]) -> None:
    names = ["no", "on", "yes", "off", "1", "012", "1.0", "2024-01-01", "null", "~", "1e5", "true"]
    folders = "".join(f"    {name}: folder{i}\n" for i, name in enumerate(names))
    assert list(load(f"chapters:\n  folders:\n{folders}{MODELS}").process.subjects) == names


@pytest.mark.parametrize("word", ["1e5", "012345", "1.0", "no", "0x10", "1_000"])
def test_what_yaml_takes_for_no_text_is_to_be_quoted(
    load: Callable[..., Plan], refused: Callable[..., str], word: str, tmp_path: Path
) -> None:
    text = f"{CHAPTERS}models: [{{name: m, revision: %s}}]"
    assert refused(text % word).endswith(f'write it in quotes: `revision: "{word}"`')
    plan = load(text % f'"{word}"')
    assert plan.models["m"].model.revision == word
    save_config(plan.config, tmp_path / "saved.yaml")
    assert load_plan(read_config([tmp_path / "saved.yaml"], {}), SCHEMA) == plan


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (
            "training: {tokens_per_step: aut}",
            ["training.tokens_per_step: 'aut'", "a whole number, at least 1, or auto"],
        ),
        ("training: {tokens_per_step: 0}", ["training.tokens_per_step: 0"]),
        ("training: {lr: many}", ["training.lr: 'many'", "a number, above 0, or auto"]),
        ("training: {lr: .nan}", ["training.lr: '.nan'", "a number"]),
        ("training: {lr: 1e999}", ["training.lr: '1e999'", "a number"]),
        ("training: {num_epochs: 012}", ["'012'", "`num_epochs: 12`"]),
        ("training: {num_epochs: 1.5}", ["1.5", "a whole number, at least 1"]),
        ("training: {compute_dtype: flot32}", ["'flot32'", "auto", "`compute_dtype: float32`"]),
        ("training:", ["training: nothing (null)"]),
        ("tracking: {wandb: maybe}", ["'maybe'", "true or false"]),
        ("windows: {val_fraction: 1}", ["1 is not allowed", "above 0 and below 1"]),
    ],
)
def test_a_message_says_what_was_found_and_what_to_write(
    refused: Callable[..., str], section: str, words: list[str]
) -> None:
    message = refused(BASE + section)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (f"{BASE}training: {{lr: 1}}\ntraining: {{lr: 2}}\n", 4),
        ("chapters:\n  folders:\n    physics: a\n    physics: b\n" + MODELS, 4),
        (f"{BASE}training: {{lr: 1, lr: 2}}\n", 3),
        (f"{CHAPTERS}models:\n- name: m\n  name: n\n", 4),
        ("chapters: {folders: {1: a, '1': b}}\n" + MODELS, 1),
    ],
)
def test_a_key_that_stands_twice_is_refused(
    refused: Callable[..., str], text: str, line: int
) -> None:
    assert f"file.yaml, line {line}: the key " in refused(text)


def test_a_key_that_stands_twice_in_json_is_refused(refused: Callable[..., str]) -> None:
    assert "the key lr occurs twice here" in refused('{"training": {"lr": 1, "lr": 2}}')


@pytest.mark.parametrize("name", ["/home/somebody/llama", "~/llama", "./llama", "../llama", ".."])
def test_a_path_is_no_name_of_a_model(refused: Callable[..., str], name: str) -> None:
    """It would be published with the SAEs; a path belongs under `source`."""
    said = refused(f"{CHAPTERS}models:\n- {{name: {name}, source: {{path: {name}}}}}\n")
    assert "models[0].name" in said and "a path" in said


def test_a_model_of_the_hub_stands_in_the_list_once_in_any_case(
    refused: Callable[..., str],
) -> None:
    models = "models:\n- {name: Qwen/Qwen3-0.6B}\n- {name: qwen/qwen3-0.6b}\n"
    assert "models[1].name" in refused(CHAPTERS + models)


def test_anchors_and_merge_keys_work(load: Callable[..., Plan]) -> None:
    plan = load(
        f"{CHAPTERS}models:\n- &first {{name: m, layers: &l [1, 2], gpus: 2}}\n"
        "- {<<: *first, name: n, batch_size: 3}\n- {<<: [{gpus: 4}, *first], name: o, layers: *l}\n"
    )
    assert [m.runtime.gpus for m in plan.models.values()] == [2, 2, 4]
    assert [m.layers for m in plan.models.values()] == [(1, 2)] * 3
    assert plan.models["n"].runtime.batch_size == 3


@pytest.mark.parametrize("inner", ["[%s]", "{%s}"])
def test_aliases_that_multiply_are_bounded(refused: Callable[..., str], inner: str) -> None:
    lines = ["a0: &a0 {x: 1}"]
    for level in range(1, 14):
        parts = [f"{f'k{i}: ' if '{' in inner else ''}*a{level - 1}" for i in range(9)]
        lines.append(f"a{level}: &a{level} {inner % ', '.join(parts)}")
    assert f"{MOST_VALUES:,} values" in refused("\n".join(lines))


@pytest.mark.parametrize("text", ["a: &a [*a]", "[" * 2000], ids=["alias of itself", "brackets"])
def test_nesting_is_bounded(refused: Callable[..., str], text: str) -> None:
    assert "nested too deeply" in refused(text)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: [1\nb: 2", "line 2"),
        (b"a: \xff", "not UTF-8"),
        (b"", "no keys"),
        (b"- a", "no keys"),
        (b"? [a]\n: b", "cannot be a key"),
        (b"a: !foo 1", "!foo"),
        (b"a: 1\n---\na: 2", "line 2"),
        (b"a: \x01", "not YAML"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "file.yaml"
    path.write_bytes(content)
    with pytest.raises(SAEError, match=f"^{path}.*{words}"):
        read_file(path)


def test_what_another_workflow_gives_may_have_no_key_that_is_no_text() -> None:
    config = {"chapters": {"folders": {False: "a"}}, "models": [{"name": "m"}]}
    with pytest.raises(SAEError, match="chapters.folders: the key False is not text"):
        load_plan(config, SCHEMA)
    config = {"chapters": {"folders": {"a": "a"}}, "models": [{"name": "m", "revision": 1.0}]}
    with pytest.raises(SAEError, match='not empty, or null, such as `revision: "1.0"`'):
        load_plan(config, SCHEMA)


def test_how_a_data_set_is_read_tokenises_nothing_again(load: Callable[..., Plan]) -> None:
    plans = [
        load(f"corpus: {{dataset_id: a/b, dataset_streaming: {given}}}\n{MODELS}")
        for given in ("false", "true")
    ]
    assert plans[0].corpus_options("") == plans[1].corpus_options("") == "--dataset-id a/b"
    assert [plan.corpus_runtime() for plan in plans] == ["", "--dataset-streaming"]


def test_excluded_tokens_change_the_training_but_not_what_is_harvested(
    load: Callable[..., Plan],
) -> None:
    """And the training then needs the tokenizer, whose model is loaded as the settings say."""
    ends = "end_to_end: {use_end_to_end: false}"
    own = "models: [{name: m, layers: [1], trust_remote_code: true%s}]"
    text = "corpus: {data_path: a.json}\n"
    plain = load(f"{text}{ends}\n{own % ''}")
    everywhere = load(f"{text}{ends}\nwindows: {{excluded_tokens: ['<|end|>', b]}}\n{own % ''}")
    of_model = load(f"{text}{ends}\n{own % ', excluded_tokens: [c]'}")
    options = {}
    for name, plan in (("plain", plain), ("everywhere", everywhere), ("of_model", of_model)):
        [model] = plan.models.values()
        [run] = model.runs(None)
        assert plan.harvest_options(model) == plain.harvest_options(*plain.models.values())
        options[name] = plan.train_options(run)
    assert "excluded" not in options["plain"] and "trust" not in options["plain"]
    assert "--excluded-tokens '<|end|>' b" in options["everywhere"]
    assert "--excluded-tokens c" in options["of_model"] and "--trust" in options["of_model"]
