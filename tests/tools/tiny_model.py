"""A tiny random language model on disk, in Hugging Face's format."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

VOCABULARY = 384
N_LAYERS = 4
WIDTH = 32

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "max_position_embeddings": 1024,
}


def tokenizer(text: str, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCABULARY` tokens; with `bos`, texts begin with one, as Gemma's do."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<bos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=special,
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    if bos:
        bpe.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|endoftext|>", bos_token="<bos>" if bos else None
    )


def configuration(family: str, n_layers: int = N_LAYERS) -> PretrainedConfig:
    """A small configuration of a model family."""
    shape = {**SHAPE, "num_hidden_layers": n_layers}
    if family == "qwen3":
        return Qwen3Config(**shape, tie_word_embeddings=True)
    if family == "llama":
        return LlamaConfig(**shape)
    if family == "gemma2":
        return Gemma2Config(**shape, query_pre_attn_scalar=8, sliding_window=64)
    return GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=n_layers, n_head=4, n_positions=1024
    )


def make_tiny_model(
    folder: Path, text: str, family: str = "qwen3", bos: bool = False, n_layers: int = N_LAYERS
) -> Path:
    """Write a random model of `family` and its tokenizer to `folder`, always the same one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configuration(family, n_layers))
    with torch.no_grad():  # embeddings as large as a trained model's, so that tokens differ
        model.get_input_embeddings().weight.mul_(20)
    model.save_pretrained(folder)
    tokenizer(text, bos).save_pretrained(folder)
    return folder
