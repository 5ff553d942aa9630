"""The families of language models that the tests cover, and the hooks they have."""

from tiny_model import WIDTH
from transformers import (
    BloomConfig,
    FalconConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    GraniteConfig,
    Olmo2Config,
    OpenAIGPTConfig,
    OPTConfig,
)

from sae_core.train_config import HOOK_NAMES

NAMES = HOOK_NAMES

FAMILIES = ("qwen3", "llama", "gemma2", "gpt2")
"""Those that `tiny_model.configuration` knows; each has every hook."""

SMALL = {"vocab_size": 64, "hidden_size": WIDTH, "num_attention_heads": 4}
SHALLOW = SMALL | {"num_hidden_layers": 2}
GATED = SHALLOW | {"intermediate_size": 64, "num_key_value_heads": 2}

OTHERS = {
    "gpt_neo": GPTNeoConfig(**SMALL, num_layers=2, attention_types=[[["global"], 2]]),
    "bloom": BloomConfig(**SHALLOW),
    "falcon": FalconConfig(**SHALLOW),
    "falcon_sequential": FalconConfig(**SHALLOW, parallel_attn=False),
    "gpt_neox": GPTNeoXConfig(**SHALLOW, intermediate_size=64),
    "olmo2": Olmo2Config(**GATED, pad_token_id=0),
    "granite": GraniteConfig(**GATED, residual_multiplier=0.22),
    "openai_gpt": OpenAIGPTConfig(vocab_size=64, n_embd=WIDTH, n_layer=2, n_head=4),
    "opt": OPTConfig(**SHALLOW, ffn_dim=64, word_embed_proj_dim=WIDTH),
    "opt_350m": OPTConfig(
        **SHALLOW, ffn_dim=64, word_embed_proj_dim=16, do_layer_norm_before=False
    ),
}
"""Other families, for what is special in their blocks: some give tuples or lists, some add in
place, some have attention and MLP side by side, some normalise after they have added."""

LACKING = {
    "falcon": {"hook_resid_mid"},
    "gpt_neox": {"hook_resid_mid"},
    "granite": {"hook_attn_out", "hook_mlp_out"},
    "openai_gpt": {"hook_resid_mid"},
    "opt": {"hook_resid_mid", "mlp.hook_in", "hook_mlp_out"},
    "opt_350m": {"hook_resid_mid", "mlp.hook_in", "hook_mlp_out"},
}
"""The hooks that a family does not have: no module gives them, or what it gives is not what the
name says."""


def hooks_of(family: str) -> tuple[str, ...]:
    """The hooks that a family has."""
    return tuple(sorted(set(NAMES) - LACKING.get(family, set())))
