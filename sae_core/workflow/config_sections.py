"""The shape of a configuration file: which settings stand in which section, and what a change of
them runs again. The schema, the documentation and the messages are made from it."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache
from typing import Annotated, Any, Literal

from sae_core.data_processing.process_config import ProcessConfig
from sae_core.labelling.config import AskingConfig, LabellingConfig
from sae_core.models.model_sources import SourceConfig
from sae_core.sae.config import SAEConfig
from sae_core.settings.groups import FromEnvironment
from sae_core.settings.services import PublishingConfig, TrackingConfig
from sae_core.settings.steps import EvaluationConfig, FeaturesConfig, HarvestConfig
from sae_core.settings.texts import CorpusConfig
from sae_core.train_config import (
    DataConfig,
    EndToEndConfig,
    HookConfig,
    ModelConfig,
    RuntimeConfig,
    TrainingConfig,
)
from sae_core.utils.limits import Filled, NaturalInt, Text, annotations

MODELS, SOURCE = "models[]", "models[].source"


@dataclass(frozen=True)
class ChapterKeys:
    """Markdown chapters, and how they become texts."""

    folders: Annotated[dict[str, Text], Filled()]
    """A folder of `*.md` or `*.markdown` files for each subject. The subject's name is shown on the
    pages. Folders are read in the order given, files in alphabetical order."""


@dataclass(frozen=True)
class ModelKeys:
    """The language models, and the SAEs to train on each."""

    name: Text
    """Hub id, or with a `source` any name that is not a path. The run name begins with it, with `/`
    as `_`."""

    source: SourceConfig = field(default_factory=SourceConfig)
    """Where the files come from, if not from the Hub under `name`."""

    layers: Literal["middle"] | Annotated[tuple[NaturalInt | Literal["middle"], ...], Filled()] = (
        "middle"
    )
    """0-based layers. Part of the run name, as a number."""

    saes: Annotated[tuple[SAEConfig, ...], Filled()] = (SAEConfig(),)
    """One SAE per layer for each entry. An entry has the keys of the `sae` section, which is also
    where the keys that it leaves out come from."""


@dataclass(frozen=True)
class Section:
    """A mapping in the configuration."""

    settings: tuple[type, ...]
    """The dataclasses whose fields are its keys; of two fields with a name, the first."""

    reruns: str
    """What a change of a key runs again."""

    exceptions: dict[str, str] = field(default_factory=dict)
    """The same for keys that differ."""

    without: tuple[str, ...] = ()
    """Fields that the workflow sets itself."""

    overrides: dict[str, str] = field(default_factory=dict)
    """Keys of other sections, with the section, that also stand here and come first."""


TRAIN = "`train` and what follows, for all SAEs, from the stored activations"
FETCH = "`fetch` and what follows"

SECTIONS: dict[str, Section] = {
    "chapters": Section(
        (ChapterKeys, ProcessConfig),
        "`process`, and with it everything but `fetch`",
        without=("subjects", "output"),
    ),
    "corpus": Section(
        (CorpusConfig,),
        "`tokenize`, and with it everything but `fetch`",
        exceptions={"dataset_streaming": "nothing"},
    ),
    "windows": Section(
        (DataConfig,), "`harvest` and what follows", exceptions={"excluded_tokens": TRAIN}
    ),
    "sae": Section((SAEConfig,), "`train` and what follows, for the SAEs that it concerns"),
    "training": Section((TrainingConfig,), TRAIN),
    "end_to_end": Section((EndToEndConfig,), TRAIN),
    "harvest": Section(
        (HarvestConfig,),
        "`harvest` and what follows, for all models",
        exceptions={
            "store": "`train` and what follows, for all SAEs",
            "layers_per_job": "nothing",
        },
    ),
    "evaluation": Section((EvaluationConfig,), "`evaluate` and what follows"),
    "features": Section((FeaturesConfig,), "`features` and what follows"),
    "labelling": Section(
        (LabellingConfig, AskingConfig),
        "`label`, `browse` and `upload`",
        exceptions={f.name: "nothing" for f in fields(AskingConfig)},
    ),
    "runtime": Section((RuntimeConfig,), "nothing"),
    "tracking": Section((TrackingConfig,), "nothing"),
    "publishing": Section((PublishingConfig,), "only `upload`"),
    MODELS: Section(
        (ModelKeys, ModelConfig, HookConfig),
        "`harvest` and what follows",
        exceptions={
            "name": "everything, as for a new model",
            "source": FETCH,
            "layers": "for a new layer: one harvest and its own jobs",
            "saes": "`train` and what follows, for the SAE",
            "revision": FETCH,
            "trust_remote_code": FETCH,
            "middle_layer_strategy": (
                "`harvest` and what follows, for `middle` and the layers harvested with it"
            ),
        },
        without=("model_name", "model_id", "hook_layer"),
        overrides={
            "max_text_length": "windows",
            "excluded_tokens": "windows",
            "gpus": "runtime",
            "batch_size": "runtime",
            "activation_batch_size": "runtime",
            "hf_base_model": "publishing",
        },
    ),
    SOURCE: Section((SourceConfig,), FETCH),
}


@dataclass(frozen=True)
class Key:
    """A key of a section."""

    name: str
    hint: Any
    """Its type, with the limits."""
    default: Any
    """`MISSING`: it is required."""
    settings: type
    """The dataclass that has it as a field."""
    reruns: str
    """What a change runs again."""
    section: str = ""
    """The section whose value is the default, for a key that overrides."""

    @property
    def meaning(self) -> str:
        """The field's docstring, in one line."""
        return docstrings(self.settings)[self.name]


def keys(name: str) -> Iterator[Key]:
    """The keys of a section, in the order in which they are documented."""
    section, seen = SECTIONS[name], set(SECTIONS[name].without)
    for settings in section.settings:
        hints = annotations(settings)
        for f in fields(settings):
            if f.name not in seen:
                seen.add(f.name)
                reruns = section.exceptions.get(f.name, section.reruns)
                yield Key(f.name, hints[f.name], _default(f), settings, reruns)
    for key, other in section.overrides.items():
        [found] = (k for k in keys(other) if k.name == key)
        yield replace(found, section=other)


def _default(f: Any) -> Any:
    """A field's default, where no environment variable replaces it."""
    if isinstance(f.default_factory, FromEnvironment):
        return f.default_factory.otherwise
    return f.default if f.default_factory is MISSING else f.default_factory()


@cache
def docstrings(settings: type) -> dict[str, str]:
    """The string under each field of a dataclass, in one line."""
    found: dict[str, str] = {}
    for kind in reversed(settings.__mro__[:-1]):
        [tree] = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(tree, ast.ClassDef)
        for statement, text in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(text, ast.Expr):
                assert isinstance(statement.target, ast.Name)
                found[statement.target.id] = " ".join(ast.literal_eval(text.value).split())
    return found
