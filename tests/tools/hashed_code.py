"""Finds the hash of a training's code when it is imported: what forks afterwards has it."""

from synthetic import KINDS

from sae_core.utils.code_hash import code_hash

for kind in KINDS:
    code_hash("sae_core/sae_train.py", sae_type=kind)
