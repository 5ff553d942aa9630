"""The options of the programs by the configuration's names, for messages of the workflow's jobs."""

import re

from sae_core.workflow.config_sections import MODELS, SECTIONS, keys

KEYS = {
    f"--{key.name.replace('_', '-')}": f"{section}.{key.name}"
    for section in SECTIONS
    for key in keys(section)
    if not key.section
}
KEYS |= {"--model-name": f"{MODELS}.name", "--hook": f"{MODELS}.hook_name"}
KEYS |= {"--hook-layer": f"{MODELS}.layers"}


def in_config_words(message: str) -> str:
    """A message with its options replaced by the configuration's keys."""

    def key(option: re.Match[str]) -> str:
        word = option[0]
        is_off = word.startswith("--no-") and word not in KEYS
        found = KEYS.get(f"--{word[5:]}" if is_off else word, word)
        return f"{found}: false" if is_off and found != word else found

    return re.sub(r"(?<![\w-])--[a-z][a-z0-9-]*", key, message)
