"""A run's settings, checked against the model and the machine before anything starts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sae_core.corpus.cache import cached_tokens
from sae_core.corpus.corpora import read_corpus
from sae_core.corpus.split import held_out_texts
from sae_core.corpus.token_file import TokenFile
from sae_core.corpus.tokens import token_ids
from sae_core.models.language_model import Hook
from sae_core.models.loading import load_tokenizer
from sae_core.models.model_configuration import check_window
from sae_core.models.model_facts import ModelFacts, check_hook, model_facts
from sae_core.pretrained import Origin
from sae_core.train_config import HookConfig, RunConfig
from sae_core.trainer.end_to_end import later_layers
from sae_core.trainer.origin import origin_of
from sae_core.trainer.training_inputs import warn_of_density
from sae_core.utils.devices import pick_device
from sae_core.utils.naming import (
    batch_checkpoint_name,
    ensure_writable,
    middle_layer,
    path_component,
    run_name,
)


def choose_hook(config: HookConfig, facts: ModelFacts) -> Hook:
    """The hook that the settings name, checked against the model.

    Raises:
        SAEError: no such layer or hook.
    """
    layer = config.hook_layer
    if layer is None:
        layer = middle_layer(facts.n_layers, config.middle_layer_strategy)
    return check_hook(Hook(layer, config.hook_name), facts.n_layers, facts.hook_names)


def choose_target(config: HookConfig, hook: Hook, facts: ModelFacts) -> Hook | None:
    """The target of a transcoder at `hook`, checked likewise; None for an SAE.

    Raises:
        SAEError: no such hook.
    """
    target = hook.target(config.target_hook_name)
    return target and check_hook(target, facts.n_layers, facts.hook_names, "--target-hook-name")


@dataclass(frozen=True)
class Named:
    """What an SAE is called, where it sits, and where its files go."""

    name: str
    hook: Hook
    output: Path
    """The final SAE directory."""
    checkpoints: Path
    target: Hook | None
    """Of a transcoder."""
    origin: Origin | None
    """The SAE that the training begins with, if not with random weights."""


@dataclass(frozen=True)
class CheckedRun(Named):
    """A run whose settings are known to fit together and the machine."""

    file: TokenFile
    """The texts, tokenised."""
    device: torch.device
    facts: ModelFacts


def check_run(config: RunConfig, batch: bool = False) -> CheckedRun:
    """Check everything that can be checked before the model is loaded, and tokenise the texts.

    Args:
        batch: name the checkpoints' folder as the batch pipeline does, not by the run name.

    Raises:
        SAEError: a setting is wrong.
    """
    [run] = check_runs([config], batch)
    return run


def check_runs(configs: Sequence[RunConfig], batch: bool = False) -> list[CheckedRun]:
    """The same for runs that differ in their SAE and its layer alone.

    Raises:
        SAEError: a setting is wrong.
    """
    for config in configs:
        warn_of_density(config.sae)
    first = configs[0]
    corpus = read_corpus(first.output)
    device = pick_device(first.runtime.device)
    facts = model_facts(first.model)
    check_window(first.data.max_text_length, facts.context_length)
    named = [_named(config, facts, batch) for config in configs]
    model = replace(first.model, revision=facts.commit)
    tokenizer = load_tokenizer(model)
    token_ids(tokenizer, first.data.excluded_tokens)
    file = cached_tokens(corpus, tokenizer, first.output.token_root)
    held_out_texts(len(file.texts), first.data.val_fraction, first.data.seed)
    return [CheckedRun(**vars(own), file=file, device=device, facts=facts) for own in named]


def _named(config: RunConfig, facts: ModelFacts, batch: bool) -> Named:
    hook = choose_hook(config.hook, facts)
    target = choose_target(config.hook, hook, facts)
    later_layers(config.end_to_end, target or hook, facts.n_layers)
    config.sae.n_features(facts.d_model)
    model_name, expansion = config.model.name, config.sae.sae_expansion
    name = path_component(
        config.output.run_name
        or run_name(model_name, hook.layer, config.hook.label, config.sae.tag, expansion),
        "--run-name",
    )
    output = ensure_writable(config.output.output_root, "--output-root") / name
    origin = origin_of(config.sae, hook, target, facts.d_model, model_name, output)
    points = batch_checkpoint_name(model_name, hook.layer, expansion) if batch else name
    checkpoints = ensure_writable(config.output.checkpoint_root, "--checkpoint-root") / points
    return Named(name, hook, output, checkpoints, target, origin)
