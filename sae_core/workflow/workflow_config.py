"""The workflow's configuration: checked against the schema, resolved into models and SAEs.

No Snakemake and no torch here: the `.smk` files ask this module what to make, and from what.
"""

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from sae_core.corpus.forms import corpus_files
from sae_core.data_processing.chapters import chapters_in
from sae_core.data_processing.process_config import ProcessConfig
from sae_core.labelling.config import AskingConfig, LabellerConfig, LabellingConfig
from sae_core.models.model_sources import FetchConfig, ModelRecord, SourceConfig
from sae_core.sae.config import SAEConfig
from sae_core.settings.groups import part_of
from sae_core.settings.services import PublishingConfig, TrackingConfig
from sae_core.settings.steps import EvaluationConfig, FeaturesConfig, HarvestConfig
from sae_core.settings.texts import CorpusConfig
from sae_core.train_config import (
    ComputeConfig,
    DataConfig,
    EndToEndConfig,
    HookConfig,
    LoadConfig,
    ModelConfig,
    RuntimeConfig,
    TrainingConfig,
    WindowsConfig,
)
from sae_core.utils.cli import options
from sae_core.utils.errors import SAEError
from sae_core.utils.files import write_file
from sae_core.utils.naming import (
    check_model_name,
    path_component,
    same_name,
)
from sae_core.utils.records import Dataclass
from sae_core.workflow import config_schema
from sae_core.workflow.config_words import in_config_words
from sae_core.workflow.run_plans import ModelPlan, RunPlan

Group = TypeVar("Group", bound=Dataclass)


@dataclass(frozen=True)
class Plan:
    """Everything that a configuration asks for."""

    process: ProcessConfig | None
    """Of a configuration with chapters."""
    corpus: CorpusConfig | None
    """Of one with texts of another form."""
    training: TrainingConfig
    end_to_end: EndToEndConfig
    harvest: HarvestConfig
    evaluation: EvaluationConfig
    features: FeaturesConfig
    labelling: LabellingConfig
    asking: AskingConfig
    runtime: RuntimeConfig
    tracking: TrackingConfig
    publishing: PublishingConfig
    config: dict[str, Any]
    """The configuration as it was given, every value of the type that its key takes."""
    models: dict[str, ModelPlan] = field(default_factory=dict)
    """By model id."""

    def model_of(self, run: str) -> ModelPlan:
        """The model that the SAE named `run` belongs to."""
        owners = [m for m in self.models.values() if run.startswith(f"{m.model_id}.blocks.")]
        return max(owners, key=lambda m: len(m.model_id))

    def run(self, name: str, n_layers: int | None) -> RunPlan:
        """The SAE of that name."""
        return self.model_of(name).runs_by_name(n_layers)[name]

    def chapters(self) -> list[Path]:
        """The existing chapters, in the order in which they are processed."""
        if self.process is None:
            return []
        folders, pattern = self.process.folders, self.process.pattern
        return [path for folder in folders for path in chapters_in(folder, pattern)]

    def corpus_files(self) -> list[Path]:
        """The existing files of a corpus in another form, in the order in which they are read.

        Raises:
            SAEError: there are none in the folder, or one has no form that is known.
        """
        path = self.corpus.data_path if self.corpus else None
        if self.corpus is None or path is None or not path.exists():
            return []
        try:
            return corpus_files(self.corpus)
        except SAEError as error:
            raise SAEError(f"config: {in_config_words(str(error))}") from error

    def process_options(self) -> str:
        """The command line of the processing."""
        return options(self.process) if self.process else ""

    def corpus_options(self, texts: str) -> str:
        """Which texts are tokenised, as a command line; `texts` are those of chapters."""
        corpus = self.corpus or CorpusConfig(data_path=Path(texts))
        return options(replace(corpus, dataset_streaming=CorpusConfig.dataset_streaming))

    def corpus_runtime(self) -> str:
        """How they are read, which changes none of them."""
        return "--dataset-streaming" if self.corpus and self.corpus.dataset_streaming else ""

    def fetch_options(self, model: ModelPlan) -> str:
        """Which model to fetch, and from where."""
        settings = model.model
        return options(
            FetchConfig(model.name, settings.revision, settings.trust_remote_code, model.source)
        )

    def tokenizer_options(self, model: ModelPlan, record: ModelRecord) -> str:
        """Where a model's tokenizer is."""
        code = "--trust-remote-code" if model.model.trust_remote_code else ""
        return _joined(f"--tokenizer {shlex.quote(record.path)}", code)

    def evaluate_options(self, model: ModelPlan) -> str:
        """How a model's SAEs are evaluated."""
        return _joined(options(part_of(LoadConfig, model.model)), options(self.evaluation))

    def features_options(self, model: ModelPlan) -> str:
        """The settings for the analysis of the features of a model's SAEs."""
        return _joined(options(part_of(LoadConfig, model.model)), options(self.features))

    def label_options(self) -> str:
        """Who labels features, and what is asked."""
        return options(part_of(LabellerConfig, self.labelling))

    def label_runtime(self, model: ModelPlan) -> str:
        """How the labeller is asked, and where it runs if it is local."""
        device = ComputeConfig(device=model.runtime.device)
        return _joined(options(self.asking), options(device))

    def harvest_options(self, model: ModelPlan) -> str:
        """The settings that determine a model's activations, except the hooks."""
        passes = f"--passes {self.harvest.passes}"
        settings = [part_of(LoadConfig, model.model), part_of(WindowsConfig, model.data)]
        return _joined(*map(options, settings), passes)

    def stream_options(self, model: ModelPlan) -> str:
        """The settings of a training without a store that all SAEs of a model have."""
        target = model.hook.target_hook_name
        hooks = f"--target-hook-name {target}" if target else ""
        settings = [self.training, model.data, self.end_to_end, part_of(LoadConfig, model.model)]
        return _joined(hooks, *map(options, settings))

    def train_options(self, run: RunPlan) -> str:
        """The settings that determine an SAE, apart from its activations."""
        target = run.model.hook.target_hook_name
        hooks = f"--hook {run.hook_spec}" + (f" --target-hook-name {target}" if target else "")
        settings = [run.sae, self.training, run.model.data, self.end_to_end]
        if self.end_to_end.use_end_to_end or run.model.data.excluded_tokens:
            settings.append(part_of(LoadConfig, run.model.model))
        return _joined(hooks, *map(options, settings))

    def tracking_options(self) -> str:
        """The settings with which a job reports an SAE to W&B, if it does."""
        return options(self.tracking) if self.tracking.wandb else ""

    def train_runtime(self, model: ModelPlan) -> str:
        """The settings for the training of a model's SAEs that change no result, except the number
        of GPUs, which Snakemake grants."""
        runtime = replace(model.runtime, gpus=RuntimeConfig.gpus)
        return _joined(options(runtime), self.tracking_options())

    def model_runtime(self, model: ModelPlan) -> str:
        """The settings for a job that runs a model that change no result."""
        return options(part_of(ComputeConfig, model.runtime))

    def evaluate_runtime(self, model: ModelPlan) -> str:
        """The settings for the evaluation of a model's SAEs that change no result."""
        return _joined(self.model_runtime(model), self.tracking_options())

    def upload_options(self, model: ModelPlan) -> str:
        """Where a model's SAEs are uploaded to, and what their cards say."""
        return options(model.publishing.repo)


def _joined(*words: str) -> str:
    return " ".join(filter(None, words))


def load_plan(config: dict[str, Any], schema: Path) -> Plan:
    """Check a configuration and resolve it.

    Raises:
        SAEError: it does not fit the schema, contradicts itself, or names an SAE twice.
    """
    config = config_schema.check(config, yaml.safe_load(schema.read_text(encoding="utf-8")))
    if ("chapters" in config) == ("corpus" in config):
        found = "both are given" if "corpus" in config else "the key chapters or corpus is missing"
        raise SAEError(
            f"config: top level: {found}; give chapters for Markdown, or corpus for texts in "
            "another form; config/README.md explains them"
        )
    section = config.get
    plan = Plan(
        process=_chapters(config["chapters"]) if "chapters" in config else None,
        corpus=_corpus(config["corpus"]) if "corpus" in config else None,
        training=_group(TrainingConfig, "training", section("training", {})),
        end_to_end=_group(EndToEndConfig, "end_to_end", section("end_to_end", {})),
        harvest=_group(HarvestConfig, "harvest", section("harvest", {})),
        evaluation=_group(EvaluationConfig, "evaluation", section("evaluation", {})),
        features=_group(FeaturesConfig, "features", section("features", {})),
        labelling=_part(LabellingConfig, "labelling", section("labelling", {})),
        asking=_part(AskingConfig, "labelling", section("labelling", {})),
        runtime=_group(RuntimeConfig, "runtime", section("runtime", {})),
        tracking=_group(TrackingConfig, "tracking", section("tracking", {})),
        publishing=_group(PublishingConfig, "publishing", section("publishing", {})),
        config=config,
    )
    for index, entry in enumerate(config["models"]):
        model = _model(entry, f"models[{index}]", config)
        if not plan.harvest.store and model.runtime.gpus > 1:
            raise SAEError(
                f"config: models[{index}]: gpus {model.runtime.gpus}: without a store the SAEs of "
                "a job are trained on 1 GPU; leave it out, and give harvest.layers_per_job for "
                "several jobs"
            )
        if same_name(model.model_id) in map(same_name, plan.models):
            raise SAEError(f"config: models[{index}].name: {model.name!r} is in the list twice")
        plan.models[model.model_id] = model
    return plan


def _chapters(given: dict[str, Any]) -> ProcessConfig:
    chapters = dict(given)
    chapters["subjects"] = tuple(map(str, chapters["folders"]))
    chapters["folders"] = tuple(Path(folder) for folder in chapters["folders"].values())
    return _group(ProcessConfig, "chapters", chapters)


def _corpus(given: dict[str, Any]) -> CorpusConfig:
    path = given.get("data_path")
    return _group(CorpusConfig, "corpus", {**given, "data_path": path and Path(path)})


def save_config(config: dict[str, Any], path: Path) -> None:
    """Write a configuration as it was given, from the file and the command line together."""
    text = yaml.dump(config, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_file(path, text)


class _Dumper(yaml.SafeDumper):
    """Text that looks like a number gets quotes, also where YAML itself does without: `1e5`."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", config_schema.NUMBER, list("-+.0123456789")
)


def check_run_names(model: ModelPlan, n_layers: int | None) -> None:
    """Check that no two SAEs of a model share a name, and that none begins with itself.

    Raises:
        SAEError: two do, or one does.
    """
    seen: set[str] = set()
    for run in model.runs(n_layers):
        path_component(run.name, "config: models")
        if run.name in seen:
            raise SAEError(
                f"config: models: two SAEs are named {run.name}; change the kind, topk or "
                "sae_expansion of one, or remove one"
            )
        seen.add(run.name)
    origins = {run.name: model.origin_run(run, n_layers) for run in model.runs(n_layers)}
    for name in origins:
        chain = [name]
        while origin := origins[chain[-1]]:
            if origin in chain:
                raise SAEError(
                    f"config: models: init_from: {name} begins with itself; name another"
                )
            chain.append(origin)


def _model(entry: dict[str, Any], where: str, config: dict[str, Any]) -> ModelPlan:
    def group(kind: type[Group], base: str | None = None) -> Group:
        known = {f.name for f in fields(kind)}
        base_values = config.get(base, {}) if base else {}
        own = {key: value for key, value in entry.items() if key in known}
        return _group(kind, where, {**base_values, **own})

    check_model_name(entry["name"], f"config: {where}.name")
    layers = entry.get("layers", "middle")
    source = dict(entry.get("source", {}))
    if source.get("path"):
        source["path"] = Path(source["path"])
    base = config.get("sae", {})
    model = ModelPlan(
        name=entry["name"],
        source=_group(SourceConfig, f"{where}.source", source),
        model=group(ModelConfig),
        layers=(layers,) if isinstance(layers, str) else tuple(layers),
        hook=group(HookConfig),
        data=group(DataConfig, "windows"),
        runtime=group(RuntimeConfig, "runtime"),
        publishing=group(PublishingConfig, "publishing"),
        saes=tuple(
            _group(SAEConfig, f"{where}.saes[{i}]", {**base, **sae})
            for i, sae in enumerate(entry.get("saes", [{}]))
        ),
    )
    if not model.needs_depth:
        check_run_names(model, None)
    return model


def _group(kind: Callable[..., Group], where: str, values: dict[str, Any]) -> Group:
    """A settings group whose messages name keys instead of command line options."""
    try:
        return kind(**{key: _plain(value) for key, value in values.items()})
    except SAEError as error:
        message = re.sub(r"--([a-z0-9-]+)", lambda m: m[1].replace("-", "_"), str(error))
        raise SAEError(f"config: {where}: {message}") from error


def _part(kind: type[Group], where: str, values: dict[str, Any]) -> Group:
    """The same for one of several groups that share a section."""
    known = {f.name for f in fields(kind)}
    return _group(kind, where, {key: value for key, value in values.items() if key in known})


def _plain(value: Any) -> Any:
    """A list as a tuple; and 8.0, an integer to the schema, as one."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return tuple(map(_plain, value)) if isinstance(value, list) else value
