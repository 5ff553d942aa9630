"""A random language model of the shape of a real one, on disk: for what depends on sizes only."""

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, Qwen3Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from sae_core.workflow.plan_tables import ModelShape

SCALE = 0.02
"""Standard deviation of the weights, as Qwen3 is initialised."""


def make_random_model(
    folder: Path,
    shape: ModelShape,
    tokenizer: PreTrainedTokenizerBase,
    n_layers: int | None = None,
    device: str = "cpu",
) -> Path:
    """Write a Qwen3 in bfloat16, always the same on one device.

    Args:
        tokenizer: its tokens are the first ones of the vocabulary.
        n_layers: instead of the shape's.
        device: that draws the weights.
    """
    config = Qwen3Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_mlp,
        num_hidden_layers=n_layers or shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device=device)
    model.tie_weights()
    draw = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                if isinstance(module, (nn.Linear, nn.Embedding)) and name == "weight":
                    weight.normal_(0, SCALE, generator=draw)
                else:
                    weight.fill_(float(name == "weight"))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
