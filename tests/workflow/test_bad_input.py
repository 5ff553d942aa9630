"""Faults that a user can make: one message that names the file, option or key, a status that is
not 0, and earlier outputs as they were."""

import json
from pathlib import Path

import pytest
from full_disks import filled, small_disk
from project import Project
from running import run_here

SINGLE = "sae_core/model_training/single_sae_training.py"


def test_a_configuration_stands_for_itself_and_is_read_strictly(project: Project) -> None:
    """Nothing of config/config.yaml, which is there, takes the place of what is missing."""
    assert (project.folder / "config/config.yaml").is_file()
    (project.folder / "config/tiny.yaml").write_text("chapters: {folders: {a: a}}\n")
    printed = project.snakemake("--dry-run", ok=False)
    message = "config: top level: the key models is missing"
    assert len([line for line in printed.splitlines() if message in line]) == 1, printed
    assert "Traceback" not in printed
    assert not (project.folder / "results").exists()


def test_a_corpus_of_another_form_is_named_by_its_key(project: Project) -> None:
    config = project.config
    del config["chapters"]
    (project.folder / "table.csv").write_text("a,b\n")
    config["corpus"] = {"data_path": "table.csv"}
    project.configure(config)
    printed = project.snakemake("--dry-run", ok=False)
    assert "config: corpus.data_path table.csv: none of the forms that are read" in printed
    assert "Traceback" not in printed and "SAEError" not in printed


def test_the_command_line_overrides_the_configuration(project: Project) -> None:
    printed = project.snakemake(
        *("results/models/tiny.json", "results/data/processed_textbooks_all.json"),
        *("--dry-run", "--printshellcmds", "--config", "chapters={method: lines, min_words: 1e1}"),
        "models=[{name: tiny, revision: '012'}]",
    )
    assert "--method lines --min-words 10" in printed
    assert "fetch.py --name tiny --revision 012" in printed


def failed_log(project: Project, printed: str, rule: str) -> str:
    """What the one job that failed said."""
    assert f"Error in rule {rule}" in printed
    logs = [path for path in (project.folder / "results/logs").rglob("*.log")]
    return "\n".join(path.read_text() for path in logs)


@pytest.mark.slow
def test_middle_that_is_also_a_number_is_found_when_the_model_is_known(
    completed_copy: Project,
) -> None:
    project = completed_copy
    config = project.config
    config["models"][0]["layers"] = [1, "middle"]
    project.configure(config)
    printed = project.snakemake(ok=False)
    assert "two SAEs are named tiny.blocks.1.hook_resid_post.btop4sae.exp2" in printed


@pytest.mark.slow
def test_a_layer_above_the_last_is_named_before_the_model_is_loaded(project: Project) -> None:
    config = project.config
    config["models"][0]["layers"] = [2, 4]
    project.configure(config)
    printed = project.snakemake(ok=False)
    assert "error: models[].layers 4: the model's layers are 0 to 3" in printed
    assert "Loading weights" not in failed_log(project, printed, "harvest")


@pytest.mark.slow
def test_a_token_that_no_tokenizer_has_is_named_when_the_model_is_fetched(project: Project) -> None:
    config = project.config
    config["windows"]["excluded_tokens"] = ["<|endoftext|>", "<|nothing|>"]
    project.configure(config)
    message = "config: models: tiny: excluded_tokens: <|nothing|>: the tokenizer has no such token"
    assert message in project.snakemake(ok=False)
    results = project.folder / "results"
    assert (results / "models/tiny.json").is_file() and not (results / "tokens").exists()
    printed = project.snakemake("--dry-run", ok=False)
    assert message in printed and "Traceback" not in printed


WINDOWS = "--max-text-length 32 --val-fraction 0.2"
"""Of the stored activations."""


@pytest.mark.xdist_group("completed")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--max-text-length 64", "has activations of other texts, windows or model settings"),
        (f"{WINDOWS} --seed 7", "has activations of other texts"),
        (f"{WINDOWS} --use-block-mse --block-mse-layers 2", "--block-mse-layers 2: the layers"),
    ],
)
def test_training_checks_what_the_end_to_end_phase_is_given(
    completed: Project, tmp_path: Path, options: str, message: str
) -> None:
    """The stored activations are of windows of 32 tokens, not of 64, nor of the default's 512."""
    results = completed.folder / "results"
    done = run_here(
        *(completed.folder / "scripts/train.py", "--tokens", next(results.glob("tokens/*"))),
        *("--record", results / "models/tiny.json", "--hook", "blocks.2.hook_resid_post"),
        *("--shards", next(results.glob("activations/tiny/*/*/0")), "--device", "cpu"),
        *("--output", tmp_path / "sae", "--checkpoints", tmp_path / "points"),
        *options.split(),
        ok=False,
    )
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "sae").exists()


def test_what_is_not_there_is_said_by_a_dry_run(project: Project) -> None:
    for chapter in (project.folder / "sae_core/data/raw_data/chemistry_chapters").glob("*.md"):
        chapter.unlink()
    printed = project.snakemake("--dry-run", ok=False)
    assert "config: chapters.folders.chemistry: sae_core/data/raw_data/chemistry" in printed


@pytest.mark.slow
def test_what_trying_again_cannot_mend_is_not_tried_again(project: Project, tmp_path: Path) -> None:
    """Every Python that starts adds a line to a file; one that was killed is tried again."""
    starts = tmp_path / "starts"
    kill = f"""
import os, pathlib, sys
if any(word.endswith("process.py") for word in sys.orig_argv):
    starts = pathlib.Path({str(starts)!r})
    starts.write_text((starts.read_text() if starts.exists() else "") + "x")
    if len(starts.read_text()) == 1:
        os.kill(os.getpid(), 9)
"""
    (tmp_path / "sitecustomize.py").write_text(kill)
    project.environment["PYTHONPATH"] = str(tmp_path)
    chapter = project.folder / "sae_core/data/raw_data/chemistry_chapters/chapter_01.md"
    good = chapter.read_bytes()
    chapter.write_bytes(b"ab\xff\xfe")
    texts = "results/data/processed_textbooks_all.json"
    printed = project.snakemake(texts, "--retries", "2", ok=False)
    assert starts.read_text() == "xx", "killed, then refused, and not started a third time"
    assert "chapter_01.md: not UTF-8" in printed.rpartition("Error in rule process")[2], printed
    chapter.write_bytes(good)
    project.snakemake(texts, "--retries", "2")
    assert starts.read_text() == "xxx"


def test_a_reason_that_no_log_takes_is_in_the_output_of_snakemake(project: Project) -> None:
    results = project.folder / "results"
    results.mkdir()
    with small_disk(results / "logs") as disk, filled(disk):
        printed = project.snakemake("results/data/processed_textbooks_all.json", ok=False)
        assert not (disk / "process.log").read_text()
    assert "error: the disk is full" in printed


@pytest.fixture
def single(tmp_path: Path, tiny_model: Path, data_path: Path):
    """Run a short single training, which fails, and return its one line; a SAE of an earlier run
    stays as it was."""
    argv = [SINGLE, "--model-name", tiny_model, "--data-path", data_path, "--num-epochs", 1]
    argv += ["--max-text-length", 32, "--tokens-per-step", 256, "--topk", 4, "--run-name", "x"]
    argv += ["--output-root", tmp_path / "saes", "--checkpoint-root", tmp_path / "points"]
    earlier = tmp_path / "saes/x/weights.pt"
    earlier.parent.mkdir(parents=True)
    earlier.write_bytes(b"earlier")

    def fail(*options: object) -> str:
        done = run_here(*argv, *options, ok=False)
        assert done.returncode == 1
        assert earlier.read_bytes() == b"earlier"
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        (line,) = (line for line in lines if not line.startswith("Loading weights"))
        return line

    return fail


def write(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        ('["a text", "cut o', "cut off"),
        ('{"a": 1}', "--text-field"),
        ('["a", 3]', "1"),
        ("[]", "empty"),
        (json.dumps(["one text"] * 3), "--val-fraction"),
        (json.dumps(["short", "texts"] * 10), "--max-text-length"),
    ],
)
def test_spoilt_texts_are_named(content: str | None, words: str, single, tmp_path: Path) -> None:
    path = tmp_path / "spoilt.json"
    if content is not None:
        path.write_text(content)
    line = single("--data-path", path, "--max-text-length", 512 if "short" in str(content) else 32)
    assert line.startswith("error: ") and words.lower() in line.lower(), line


def test_a_missing_model_is_named(single, tmp_path: Path) -> None:
    assert str(tmp_path / "nothing") in single("--model-name", tmp_path / "nothing")
    assert "--model-name no/body" in single("--model-name", "no/body")
    assert "config.json" in single("--model-name", tmp_path)


def test_wrong_hooks_names_and_devices_are_named(single) -> None:
    assert "--hook-layer 4" in single("--hook-layer", 4)
    assert "hook_resid_post" in single("--hook-name", "hook_nowhere")
    assert "--run-name" in single("--run-name", "../up")
    assert "--device cuda" in single("--device", "cuda")
    assert "--load-in-4bit" in single("--load-in-4bit")


def test_a_folder_that_cannot_be_written_is_named(single, tmp_path: Path) -> None:
    blocked = write(tmp_path / "file", "")
    assert f"--output-root: cannot write to {blocked}/saes" in single(
        "--output-root", blocked / "saes"
    )
    assert "--checkpoint-root" in single("--checkpoint-root", blocked / "points")
    assert "--output-root: cannot write to /proc/saes" in single("--output-root", "/proc/saes")
