"""The options of the programs by the configuration's names, for messages of the workflow's jobs."""

import re
from dataclasses import fields

from sae_core.data_processing.textbook_process import ProcessConfig
from sae_core.model_sources import SourceConfig
from sae_core.sae_config import SAEConfig
from sae_core.train_config import (
    DataConfig,
    EndToEndConfig,
    EvaluationConfig,
    FeaturesConfig,
    HarvestConfig,
    HookConfig,
    ModelConfig,
    PublishingConfig,
    RuntimeConfig,
    TrackingConfig,
    TrainingConfig,
)

SECTIONS: dict[str, type] = {
    "models[].source": SourceConfig,
    "chapters": ProcessConfig,
    "windows": DataConfig,
    "sae": SAEConfig,
    "training": TrainingConfig,
    "end_to_end": EndToEndConfig,
    "harvest": HarvestConfig,
    "evaluation": EvaluationConfig,
    "features": FeaturesConfig,
    "runtime": RuntimeConfig,
    "tracking": TrackingConfig,
    "publishing": PublishingConfig,
}
OF_A_MODEL = (ModelConfig, HookConfig)

KEYS = {
    f"--{field.name.replace('_', '-')}": f"{section}.{field.name}"
    for section, settings in (*SECTIONS.items(), *(("models[]", kind) for kind in OF_A_MODEL))
    for field in fields(settings)
}
KEYS |= {"--model-name": "models[].name", "--name": "models[].name", "--hook": "models[].hook_name"}
KEYS |= {"--hook-layer": "models[].layers"}
for own in ("--output", "--subjects", "--model-id"):  # the workflow's own
    del KEYS[own]


def in_config_words(message: str) -> str:
    """A message with its options replaced by the configuration's keys."""

    def key(option: re.Match[str]) -> str:
        word = option[0]
        is_off = word.startswith("--no-") and word not in KEYS
        found = KEYS.get(f"--{word[5:]}" if is_off else word, word)
        return f"{found}: false" if is_off and found != word else found

    return re.sub(r"(?<![\w-])--[a-z][a-z0-9-]*", key, message)
