"""The families of language models that the tests cover, and the hooks they have."""

from tiny_model import WIDTH
from transformers import BloomConfig, FalconConfig, GPTNeoConfig, OPTConfig

from sae_core.train_config import HOOK_NAMES

NAMES = HOOK_NAMES

FAMILIES = ("qwen3", "llama", "gemma2", "gpt2")
"""Those that `tiny_model.configuration` knows; each has every hook."""

SMALL = {"vocab_size": 64, "hidden_size": WIDTH, "num_attention_heads": 4}

OTHERS = {
    "gpt_neo": GPTNeoConfig(**SMALL, num_layers=2, attention_types=[[["global"], 2]]),
    "bloom": BloomConfig(**SMALL, num_hidden_layers=2),
    "falcon": FalconConfig(**SMALL, num_hidden_layers=2),
    "opt": OPTConfig(**SMALL, num_hidden_layers=2, ffn_dim=64, word_embed_proj_dim=WIDTH),
}
"""Older families; the blocks of the first three give tuples."""
