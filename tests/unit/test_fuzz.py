"""Input mangled at random: what reads it does, or says in one line which file or key is wrong."""

import copy
import io
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from mangling import NASTY, fuzz, json_bytes, mangled, said
from running import ROOT
from synthetic import random_sae

from sae_core.activations.shards import harvest
from sae_core.activations.store import CachedSource
from sae_core.activations.token_windows import TokenWindows
from sae_core.data_processing.cleaning import clean
from sae_core.data_processing.counts import Counts
from sae_core.data_processing.lines import Settings
from sae_core.data_processing.texts import read_texts
from sae_core.formats.checkpoint import load_history, load_sae, save_sae
from sae_core.models.language_model import Hook, LanguageModel
from sae_core.models.model_sources import ModelRecord
from sae_core.pretrained import load_pretrained
from sae_core.utils.errors import SAEError
from sae_core.utils.naming import path_component, run_name
from sae_core.workflow.workflow_config import Plan, load_plan

SCHEMA = ROOT / "workflow/schemas/config.schema.yaml"


# Configurations

DEMO = yaml.safe_load((ROOT / "config/demo.yaml").read_text(encoding="utf-8"))
DEMO["models"][0] |= {"layers": [1, "middle"], "hook_name": "hook_mlp_out", "saes": [{"topk": 4}]}
DEMO |= {"runtime": {"device": "cpu"}, "tracking": {"wandb": True, "wandb_tags": ["a"]}}
DEMO |= {"publishing": {"hf_repo_id": "a/b"}, "end_to_end": {"block_mse_layers": []}}


def check_names(plan: Plan) -> None:
    """Every file of a plan lies where it should, and its commands are lines."""
    for model in plan.models.values():
        for run in model.runs(12):
            for name in (run.name, model.model_id, model.hook.hook_name):
                assert Path("/root/results", name).resolve().parent == Path("/root/results")
                assert name[0] not in "-." and not set(name) & set(" $`;|&<>'\"\\\n\0*?")
                assert len(name.encode()) < 200
            commands = (plan.train_options(run), plan.fetch_options(model))
            assert all("\n" not in line and "\0" not in line for line in commands)


@fuzz
@given(mangled(DEMO))
def test_a_configuration(config: Any) -> None:
    plan = said(lambda: load_plan(config, SCHEMA), "config: ")
    if plan is not None:
        check_names(plan)


@fuzz
@given(st.one_of(st.text(max_size=40), st.sampled_from(NASTY)))
def test_a_models_name_cannot_leave_the_root(name: str) -> None:
    config = copy.deepcopy(DEMO)
    config["models"][0]["name"] = name
    plan = said(lambda: load_plan(config, SCHEMA), "config: models")
    if plan is not None:
        check_names(plan)


@fuzz
@given(st.one_of(st.text(max_size=200), st.sampled_from(NASTY)))
def test_a_run_name_makes_one_folder_or_none(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    folder = tmp_path_factory.mktemp("root")
    for given_name in (name, run_name(name, 3, "hook_resid_post", "btop4sae", 2)):
        safe = said(lambda n=given_name: path_component(n, "--run-name"), "--run-name: ")
        if safe is not None:
            (folder / "saes" / safe).mkdir(parents=True)
            assert [path.name for path in (folder / "saes").iterdir()] == [safe]
            (folder / "saes" / safe).rmdir()
    assert {path.name for path in folder.iterdir()} <= {"saes"}


# Texts


@fuzz
@given(json_bytes)
def test_texts(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "texts.json"
    path.write_bytes(content)
    texts = said(lambda: read_texts(path), f"--data-path {path}: ")
    if texts is not None:
        assert texts and all(text.encode() is not None for text in texts)


@fuzz
@given(json_bytes)
def test_a_models_record(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.json"
    path.write_bytes(content)
    assert said(lambda: ModelRecord.load(path), f"{path}: not a readable model record") is None


# SAE directories


@pytest.fixture(scope="module")
def sae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    folder = tmp_path_factory.mktemp("saes") / "sae"
    origin = {"model_name": "a/b", "max_text_length": 8, "val_fraction": 0.1, "seed": 3}
    save_sae(folder, random_sae(dtype=torch.float32, metadata=origin), {"loss": [1.0, None]})
    return folder


def copied(folder: Path, into: Path) -> Path:
    shutil.rmtree(into / "copy", ignore_errors=True)
    return Path(shutil.copytree(folder, into / "copy"))


def cut_or_changed(content: bytes, draw: random.Random) -> bytes:
    """A file that lacks its end, or has other bytes somewhere, or more of them."""
    at = draw.randrange(len(content))
    return draw.choice(
        [
            content[:at],
            content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :],
            content[:at] + draw.randbytes(9) + content[at:],
            content[at:],
            content + b"\0",
        ]
    )


@fuzz
@given(st.randoms(use_true_random=False))
def test_damaged_weights(sae_folder: Path, tmp_path: Path, draw: random.Random) -> None:
    folder = copied(sae_folder, tmp_path)
    path = folder / "weights.pt"
    path.write_bytes(cut_or_changed(path.read_bytes(), draw))
    assert said(lambda: load_sae(folder), f"{path}: ") is None


tensors = st.one_of(
    st.builds(
        lambda shape, dtype: torch.zeros(shape).to(dtype),
        st.lists(st.integers(0, 24), max_size=3),
        st.sampled_from([torch.float32, torch.int64, torch.bool, torch.complex64, torch.float16]),
    ),
    st.sampled_from(
        [
            torch.full((20, 6), torch.nan),
            torch.full((20,), torch.inf),
            torch.zeros(1).expand(10**6, 10**6),
            torch.eye(20, 6).to_sparse(),
            torch.empty(20, 6, device="meta"),
            torch.zeros(20, 6, dtype=torch.float8_e4m3fn),
        ]
    ),
    st.sampled_from([None, 3, "text", [1.0]]),
)


@fuzz
@given(st.dictionaries(st.sampled_from(["W_dec", "W_enc", "b_dec", "b_enc", "threshold",
                                        "ever_fired", "more"]), tensors, min_size=1),
       st.booleans())  # fmt: skip
def test_other_tensors(
    sae_folder: Path, tmp_path: Path, changes: dict[str, Any], with_hash: bool
) -> None:
    """Also with a configuration that says nothing of the weights' hash, as old ones do."""
    folder = copied(sae_folder, tmp_path)
    stored = torch.load(folder / "weights.pt", weights_only=True)
    torch.save(stored | changes, folder / "weights.pt")
    if not with_hash:
        config = json.loads((folder / "config.json").read_text()) | {"weights_sha256": ""}
        (folder / "config.json").write_text(json.dumps(config))
    sae = said(lambda: load_sae(folder), f"{folder / 'weights.pt'}: ")
    assert not (with_hash and sae)
    if sae is not None:
        assert sae(torch.zeros(2, 6)).isfinite().all()


@fuzz
@given(st.data())
def test_another_configuration(sae_folder: Path, tmp_path: Path, data: Any) -> None:
    folder = copied(sae_folder, tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps(data.draw(mangled(json.loads(path.read_text())))))
    names = (f"{path}: ", f"{folder / 'weights.pt'}: ")
    sae = said(lambda: load_sae(folder), *names)
    if sae is not None:
        assert sae(torch.zeros(2, 6)).isfinite().all()


def test_the_configuration_of_another_run_of_the_same_shape(
    sae_folder: Path, tmp_path: Path
) -> None:
    folder = copied(sae_folder, tmp_path)
    other = random_sae(dtype=torch.float32, seed=1, hook_layer=2, hook_name="hook_mlp_out")
    save_sae(tmp_path / "other", other, {})
    shutil.copy(tmp_path / "other/config.json", folder)
    with pytest.raises(SAEError, match="weights.pt: not the weights that config.json was written"):
        load_sae(folder)


@fuzz
@given(json_bytes)
def test_a_history(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "history.json").write_bytes(content)
    history = said(lambda: load_history(tmp_path), f"{tmp_path / 'history.json'}: ")
    assert history is None or all(isinstance(column, list) for column in history.values())


class Evil:
    """Unpickled, it calls something."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, tuple]:
        return self.call[0], self.call[1:]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("call", [os.mkdir, os.system, exec, open, shutil.copy])
@pytest.mark.parametrize(
    "wrap", [lambda e: e, lambda e: {"W_dec": e}, lambda e: {e: 1}, lambda e: [{"y": (e,)}]]
)
@pytest.mark.parametrize("plain", [True, False])
def test_code_in_a_pickle_is_never_run(
    call: Callable, wrap: Callable, plain: bool, sae_folder: Path, tmp_path: Path
) -> None:
    folder, canary = copied(sae_folder, tmp_path), tmp_path / "canary"
    arguments: dict[Any, tuple] = {
        os.mkdir: (str(canary),),
        os.system: (f"touch {canary}",),
        exec: (f"open({str(canary)!r}, 'w')",),
        open: (str(canary), "w"),
        shutil.copy: (str(folder / "config.json"), str(canary)),
    }
    evil = wrap(Evil(call, *arguments[call]))
    file = io.BytesIO()
    pickle.dump(evil, file) if plain else torch.save(evil, file)
    (folder / "weights.pt").write_bytes(file.getvalue())
    with pytest.raises(SAEError, match="weights.pt: not a readable file of tensors"):
        load_pretrained(folder)
    assert not canary.exists()


@fuzz
@given(st.one_of(st.text(max_size=60), st.sampled_from(NASTY), st.just("a/b/../../../c")))
def test_names_of_pretrained_saes(name: str) -> None:
    assert said(lambda: load_pretrained(f"no-such/{name}"), "no-such/", "'no-such/", '"no') is None


# Shards

HOOK = Hook(1, "hook_resid_post")


@pytest.fixture(scope="module")
def shard(
    language_model: LanguageModel, windows: TokenWindows, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Not to be changed."""
    folder = tmp_path_factory.mktemp("shards") / "0"
    harvest(language_model, windows, [HOOK], folder, batch_size=8)
    return folder


def open_shard(folder: Path) -> CachedSource:
    return CachedSource([folder], HOOK, tokens_per_step=64, seed=0)


@fuzz
@given(st.data())
def test_a_shards_manifest(shard: Path, tmp_path: Path, data: Any) -> None:
    folder = copied(shard, tmp_path)
    path = folder / "manifest.json"
    original = json.loads(path.read_text())
    changed = data.draw(mangled(original))
    path.write_text(json.dumps(changed))
    source = said(lambda: open_shard(folder), f"{path}: ")
    assert (source is not None) == (json.dumps(changed) == json.dumps(original))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "int32", "os"])
def test_a_shards_number_format(dtype: str, shard: Path, tmp_path: Path) -> None:
    folder = copied(shard, tmp_path)
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"float32"', f'"{dtype}"'))
    assert said(lambda: open_shard(folder), f"{path}: has changed since it was written") is None


@pytest.mark.parametrize("part", ["train", "validation"])
@pytest.mark.parametrize("size", [0, 1, 0.5, -4, 4])
def test_a_shards_length(part: str, size: float, shard: Path, tmp_path: Path) -> None:
    folder = copied(shard, tmp_path)
    path = folder / f"{HOOK.spec}.{part}.bin"
    content = path.read_bytes()
    whole = len(content)
    length = {0: 0, 1: 1, 0.5: whole // 2, -4: whole - 4, 4: whole + 4}[size]
    path.write_bytes((content + b"\0" * 4)[:length])
    with pytest.raises(SAEError, match=f"bin: {length} bytes, expected {whole}; harvest again"):
        open_shard(folder)


MARKDOWN = [
    *(
        "[",
        "![",
        "]",
        "*",
        "**",
        "`",
        "```",
        "\n```\n",
        "~~~",
        "<!-- ",
        "-->",
        "<a ",
        "<b>",
        "&#",
        "$",
    ),
    *("$$", "\n$$\n", "\\", "\\(", "\\)", "[a](", "b)", "[^a]", "\n[^a]: ", "\n[a]: /b\n", "\n> "),
    *(
        "\n",
        "\n\n",
        "a ",
        "B ",
        "1",
        "|",
        "\n| a | b |\n|--|--|\n",
        "\n---\n",
        "<table>",
        "</table>",
    ),
    *(
        "<td>",
        "<h1>",
        "<br>",
        "<pre>",
        "</pre>",
        "<script>",
        "</script>",
        "\n# ",
        ".# A",
        " • ",
        "-\n",
    ),
    *("FIGURE 1 ", "    ", "  \n", "```{note}\n", "细", "---\na: b\n", "\\begin{align}", "- ", "é"),
]


@fuzz
@given(
    st.lists(st.sampled_from(MARKDOWN), max_size=60).map("".join),
    st.sampled_from([Settings(), Settings(code="placeholder", latex="drop")]),
)
def test_any_markdown_is_cleaned(chapter: str, how: Settings) -> None:
    paragraphs = clean(chapter, Counts(), how)
    assert all(line.strip() for lines in paragraphs for line in lines)
    assert all(lines for lines in paragraphs)
