"""Every command of docs/commands.md, run as written; the Hub's cache holds tiny models in place
of the large ones. Those that would send something are read only: test_tracked_commands.py runs
such."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from project import Project
from running import ROOT, Run, run_here, run_python

from sae_core.model_training.Qwen3_all_sae_training import BatchConfig
from sae_core.train_config import RunsConfig
from sae_core.utils import cli

HUB_MODELS = {
    **{f"Qwen/Qwen3-{size}": "qwen3" for size in ("0.6B", "1.7B", "4B", "8B", "14B", "32B")},
    "google/gemma-2-2b": "gemma2",
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
N_LAYERS = 14
WORDS_A_CHAPTER = 900


def commands() -> list[str]:
    """The `python` commands of the page, continuation lines joined."""
    page = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.strip()]


def sends(command: str) -> bool:
    words = set(shlex.split(command))
    return bool({"--wandb", "--upload-to-hf"} & words) and "offline" not in words


def needs_results(command: str) -> bool:
    """Of the workflow, by the names RUN and MODEL."""
    return "results/" in command


def needs_an_sae(command: str) -> bool:
    words = ("eval_sae", "--init-from smoke_test_sae", "--sae smoke_test_sae", "compare.py")
    return any(word in command for word in words)


@pytest.fixture(scope="session")
def hub_home(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A Hugging Face home whose cache holds a tiny model under each large one's name."""
    from tiny_model import make_tiny_model

    home = tmp_path_factory.mktemp("hf_home")
    for name, family in HUB_MODELS.items():
        repository = home / "hub" / f"models--{name.replace('/', '--')}"
        make_tiny_model(
            repository / "snapshots" / COMMIT,
            " ".join(texts),
            family,
            bos=family == "gemma2",
            n_layers=N_LAYERS,
        )
        (repository / "refs").mkdir()
        for revision in ("main", "v1"):
            (repository / "refs" / revision).write_text(COMMIT)
    return home


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the package with short chapters, where the commands are run."""
    ignore = shutil.ignore_patterns("__pycache__", "pretrained_models", "checkpoints", "*_data")
    shutil.copytree(ROOT / "sae_core", tmp_path / "sae_core", ignore=ignore)
    for subject in ("physics", "chemistry", "biology"):
        name = f"sae_core/data/raw_data/{subject}_chapters/chapter_01.md"
        words = (ROOT / name).read_text(encoding="utf-8").split(" ")[:WORDS_A_CHAPTER]
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(" ".join(words))
    return tmp_path


def arguments(command: str) -> list[str]:
    program, *rest = shlex.split(command)
    assert program == "python"
    return rest


@pytest.fixture
def in_checkout(checkout: Path, hub_home: Path, monkeypatch: pytest.MonkeyPatch):
    """Run a command of the page in the copy, in this process unless `start` says otherwise; its
    texts are there, also under another name."""
    environment = {"HF_HOME": str(hub_home), "SAE_HF_REPO_ID": "someone/saes", "PYTHONPATH": ""}
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub_home / "hub"))  # as HF_HOME would
    run_here("sae_core/data_processing/textbook_process.py", cwd=checkout)
    (checkout / "path/to").mkdir(parents=True)
    shutil.copy(
        checkout / "sae_core/data/processed_data/processed_textbooks_all.json",
        checkout / "path/to/your_dataset.json",
    )

    def in_checkout(command: str, ok: bool = True, start: Run = run_here):
        return start(*arguments(command), cwd=checkout, ok=ok, env=environment)

    return in_checkout


def test_the_page_has_the_commands() -> None:
    assert len([c for c in commands() if not sends(c)]) >= 14
    assert len([c for c in commands() if sends(c)]) >= 10


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [c for c in commands() if not (sends(c) or needs_an_sae(c) or needs_results(c))],
)
def test_command_runs_as_written(command: str, in_checkout, checkout: Path) -> None:
    done = in_checkout(command)
    saes = list((checkout / "sae_core/pretrained_models").glob("*"))
    if "--help" in command or "textbook_process" in command:
        assert not saes
        return
    models = re.findall(r"(?:Qwen|google)/\S+", command) or ["Qwen/Qwen3-0.6B"]
    if command.endswith("Qwen3_all_sae_training.py"):
        models = [name for name in HUB_MODELS if name.startswith("Qwen")]
    n_saes = len(models)
    if "single_sae_training" in command:
        n_saes = len(cli.parse(RunsConfig, "", arguments(command)[1:]).runs())
    assert len(saes) == n_saes
    for sae in saes:
        assert f"{sae.name}" in done.stdout
        config = json.loads((sae / "config.json").read_text())
        assert config["metadata"]["model_name"] in models
        assert config["metadata"]["model_commit"] == COMMIT
        assert config["metadata"]["prepend_bos"] == ("gemma" in command)
        assert (sae / "weights.pt").is_file() and (sae / "history.json").is_file()


@pytest.mark.xdist_group("completed")
@pytest.mark.parametrize("command", [c for c in commands() if needs_results(c)])
def test_command_runs_on_results(command: str, completed: Project) -> None:
    [run] = (completed.folder / "results/features").glob("*blocks.2*btop4*.json")
    words = command.replace("RUN", run.stem).replace("MODEL", "tiny")
    words = words.replace(f" --labels results/labels/{run.stem}.jsonl", "")  # not asked for
    done = run_here(*arguments(words), cwd=completed.folder)
    assert list((completed.folder / done.stdout.strip()).rglob("*.jsonl.gz"))


@pytest.mark.parametrize("command", [c for c in commands() if sends(c)])
def test_command_that_sends_is_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAE_HF_REPO_ID", "someone/saes")
    script, *options = arguments(command)
    config = cli.parse(BatchConfig if "Qwen3_all" in script else RunsConfig, "", options)
    assert config.tracking.wandb == ("--wandb" in options)
    assert config.publishing.upload_to_hf == ("--upload-to-hf" in options)


@pytest.mark.slow
def test_side_by_side_evaluation_and_module_form(in_checkout, checkout: Path) -> None:
    smoke, evaluation = (
        next(c for c in commands() if word in c and not sends(c))
        for word in ("smoke_test_sae", "eval_sae_minibatch")
    )
    # Long enough texts for two held-out windows; run as a module.
    in_checkout(
        smoke.replace("sae_core/model_training/single_sae_training.py",
                      "-m sae_core.model_training.single_sae_training")
        + " --val-fraction 0.3",
        start=run_python,
    )  # fmt: skip
    table = in_checkout(evaluation, start=run_python).stdout
    assert "smoke_test_sae" in table and "best_model.pt" in table
    tuning, reading, steering, comparing = (
        next(c for c in commands() if word in c)
        for word in ("--init-from", "inspect_text.py", "steer.py", "compare.py")
    )
    assert "smoke_test_sae" in in_checkout(f"{tuning} --val-fraction 0.3").stdout
    shutil.copytree(ROOT / "scripts", checkout / "scripts")
    in_checkout(reading)
    tokens = re.findall('<td class="name">(.*?)</td>', (checkout / "light.html").read_text())
    assert "absorbed" in "".join(tokens)
    assert "== strength 40" in in_checkout(steering).stdout
    assert "smoke_test_sae_ft: of " in in_checkout(comparing).stdout
    heading = next(line for line in table.splitlines() if line.startswith("SAE"))
    assert heading.split()[:4] == ["SAE", "MSE", "FVU", "L0"]
    *_, last = table.splitlines()
    assert last.split()[0] == str(N_LAYERS - 1) and last.split()[1] == last.split()[2]
    results = json.loads(in_checkout(f"{evaluation} --json").stdout)
    final, best = (dict(result, run_name="") for result in results)
    assert final == best, "the final SAE is the best checkpoint"
    assert set(final["block_mse"]) == {str(layer) for layer in range(7, N_LAYERS)}


@pytest.mark.slow
def test_batch_goes_on_when_a_model_fails(in_checkout, checkout: Path) -> None:
    done = in_checkout(
        "python sae_core/model_training/Qwen3_all_sae_training.py --num-epochs 1"
        " --models nobody/nothing Qwen/Qwen3-0.6B",
        ok=False,
        start=run_python,
    )
    table = done.stdout.splitlines()[-2:]
    assert "FAILED" in table[0] and "nobody/nothing" in table[0]
    assert "Qwen_Qwen3-0.6B.blocks.6.hook_resid_post.btop128sae.exp4" in table[1]
    assert "1 of 2 models failed" in done.stderr
    assert (checkout / "sae_core/checkpoints/Qwen_Qwen3-0.6B_layer6_exp4/best_model.pt").is_dir()


def test_batch_settings_suit_the_model_unless_given() -> None:
    expected = {
        "0.6B": (8, 512), "1.7B": (4, 512), "4B": (2, 384), "8B": (1, 256), "14B": (1, 192),
        "32B": (1, 128),
    }  # fmt: skip
    plain = cli.parse(BatchConfig, "", [])
    given = cli.parse(BatchConfig, "", ["--batch-size", "3", "--max-text-length", "64"])
    assert plain.model.models == tuple(f"Qwen/Qwen3-{size}" for size in expected)
    for size, (batch_size, length) in expected.items():
        run = plain.run(f"Qwen/Qwen3-{size}")
        assert (run.runtime.batch_size, run.data.max_text_length) == (batch_size, length)
        assert run.sae.sae_type == "batch_topk" and run.model.model_name == f"Qwen/Qwen3-{size}"
        run = given.run(f"Qwen/Qwen3-{size}")
        assert (run.runtime.batch_size, run.data.max_text_length) == (3, 64)


@pytest.mark.slow
def test_a_revision_is_resolved_and_recorded(in_checkout, checkout: Path) -> None:
    command = (
        "python sae_core/model_training/single_sae_training.py --num-epochs 1 --run-name x "
        "--max-text-length 64 --revision "
    )
    in_checkout(command + "v1")
    config = json.loads((checkout / "sae_core/pretrained_models/x/config.json").read_text())
    assert config["metadata"]["model_commit"] == COMMIT
    done = in_checkout(command + "v2", ok=False)
    assert "--model-name Qwen/Qwen3-0.6B" in done.stderr
