"""Errors of a configuration that can be found before a job runs, from what is on the disk."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from sae_core.data_processing.chapters import find_chapters
from sae_core.data_processing.process_config import ProcessConfig
from sae_core.formats.sae_places import hub_place
from sae_core.models.model_sources import ModelRecord
from sae_core.settings.texts import CorpusConfig
from sae_core.train_config import ModelConfig
from sae_core.utils.errors import SAEError
from sae_core.workflow.workflow_config import ModelPlan, Plan


def check_inputs(plan: Plan, record_of: Callable[[str], Path]) -> None:
    """Check the chapters, the local models, and the settings for models that have been fetched.

    Args:
        record_of: where the record of a model is, once it is fetched; by model id.

    Raises:
        SAEError: a job would fail for want of a file, a layer, a hook, a token or a long enough
            context.
    """
    if plan.process is not None:
        _check_chapters(plan.process)
    if plan.corpus is not None:
        _check_corpus(plan.corpus, plan.corpus_files())
    for name, model in plan.models.items():
        path = record_of(name)
        n_layers = None
        if path.is_file():
            record = ModelRecord.load(path)
            _check_places(model, record, path)
            n_layers = record.n_layers
        else:
            _check_source(model)
        if n_layers is not None or not model.needs_depth:
            _check_origins(model, n_layers)


def _check_chapters(process: ProcessConfig) -> None:
    subjects: dict[Path, str] = {}
    for index, folder in enumerate(process.folders):
        subject = process.subject_of(index)
        where = f"config: chapters.folders.{subject}: {folder}"
        for path in find_chapters(folder, where, process.pattern):
            if set("{}") & set(str(path)):
                raise SAEError(
                    f"{where}: Snakemake takes the braces in {path} as a pattern; rename it"
                )
        other = subjects.setdefault(folder.resolve(), subject)
        if other != subject:
            raise SAEError(f"{where}: also the folder of {other}; give each subject its own")


def _check_corpus(corpus: CorpusConfig, files: list[Path]) -> None:
    path = corpus.data_path
    if path is None:
        return
    if not path.exists():
        raise SAEError(f"config: corpus.data_path: {path}: no such file or folder")
    for file in files:
        if set("{}") & set(str(file)):
            raise SAEError(
                f"config: corpus.data_path: Snakemake takes the braces in {file} as a pattern; "
                "rename it"
            )


def _check_source(model: ModelPlan) -> None:
    if model.source.path is None:
        return
    folder = model.source.path.expanduser()
    where = f"config: models: {model.name}: source.path: {model.source.path}"
    if not folder.is_dir():
        raise SAEError(f"{where}: no such folder; name the model's directory")
    if not (folder / "config.json").is_file():
        raise SAEError(
            f"{where}: contains no config.json; name a directory in Hugging Face's format"
        )


def _check_origins(model: ModelPlan, n_layers: int | None) -> None:
    """Check that the SAEs that trainings begin with are there, or that the Hub may have them."""
    for run in model.runs(n_layers):
        name = run.origin
        if name is None or model.origin_run(run, n_layers):
            continue
        try:
            if run.origin_sha256 == {}:
                hub_place(name)
        except SAEError as error:
            raise SAEError(f"config: models: {model.name}: init_from: {error}") from error


def _check_places(model: ModelPlan, record: ModelRecord, path: Path) -> None:
    """Check layers and hooks against a model's record, unless that is about other files."""
    local = model.source.path
    if local is not None and record.path != str(local.expanduser().resolve()):
        return
    where = f"config: models: {model.name}"
    for layer in model.layers:
        if isinstance(layer, int) and layer >= record.n_layers:
            raise SAEError(
                f"{where}: layers: {layer}: the model's layers are 0 to {record.n_layers - 1} "
                f"(as {path} says; delete that file if the model has changed)"
            )
    length, limit = model.data.max_text_length, record.context_length
    if limit is not None and length > limit:
        raise SAEError(
            f"{where}: max_text_length: {length}: the model reads at most {limit} tokens; use "
            "shorter windows"
        )
    hooks = {"hook_name": model.hook.hook_name, "target_hook_name": model.hook.target_hook_name}
    for key, hook in hooks.items():
        if hook and hook not in record.hook_names:
            raise SAEError(f"{where}: {key}: {hook}: this model has {', '.join(record.hook_names)}")
    check_excluded_tokens(model, record)


def check_excluded_tokens(model: ModelPlan, record: ModelRecord) -> None:
    """Check that a fetched model's tokenizer has the tokens that are left out of the training.

    Raises:
        SAEError: it lacks one.
    """
    tokens, folder = model.data.excluded_tokens, Path(record.path)
    if tokens and folder.is_dir():
        try:
            _check_tokens(folder, tokens, model.model.trust_remote_code)
        except SAEError as error:
            said = str(error).removeprefix("--excluded-tokens ")
            raise SAEError(f"config: models: {model.name}: excluded_tokens: {said}") from error


@cache
def _check_tokens(folder: Path, tokens: tuple[str, ...], trust_remote_code: bool) -> None:
    """Check that the tokenizer in a folder has some tokens. If its file has them all, no library
    is imported."""
    if set(tokens) <= _vocabulary(folder / "tokenizer.json"):
        return
    try:
        from sae_core.corpus.tokens import token_ids
        from sae_core.models.loading import load_tokenizer
    except ModuleNotFoundError:  # Snakemake has an environment of its own; then a job checks
        return
    config = ModelConfig(model_name=str(folder), trust_remote_code=trust_remote_code)
    token_ids(load_tokenizer(config), tokens)


def _vocabulary(file: Path) -> set[str]:
    """The tokens in a file of the `tokenizers` library; none if it is not one."""
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        pieces = vocabulary if isinstance(vocabulary, dict) else (piece for piece, _ in vocabulary)
        return {*pieces, *(token["content"] for token in content["added_tokens"])}
    except (OSError, ValueError, KeyError, TypeError):
        return set()
