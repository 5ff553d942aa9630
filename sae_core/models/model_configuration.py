"""What a language model's `config.json` says: the file itself, and how many tokens it allows."""

from typing import Any

from sae_core.models.model_places import Place, cannot_load
from sae_core.utils.errors import SAEError

LIMITS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "n_ctx")
"""Names of the maximum number of tokens; the first one in a configuration counts."""


def read_configuration(name: str, place: Place, trust_remote_code: bool) -> Any:
    """The configuration of the model `name`, as transformers reads it.

    Raises:
        SAEError: there is none, or it is damaged.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            place.source, revision=place.revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # damaged files raise all kinds
        raise cannot_load(name, error) from error


def context_length(config: Any) -> int | None:
    """The maximum number of tokens a model reads: the positions that it was trained on, stretched
    like its rotary embedding. None without a limit, as with relative positions."""
    text = config.get_text_config()
    if getattr(text, "alibi", False):  # attention uses distances, which may be any
        return None
    stated = (getattr(text, name, None) for name in LIMITS)
    limit = next((n for n in stated if isinstance(n, int) and n > 0), None)
    if limit is None:
        return None
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    factor = rope.get("factor") or 1  # where each kind of layer has its own, the limit has it in
    original = rope.get("original_max_position_embeddings") or limit
    further = getattr(text, "model_max_length", None) or 0
    return max(limit, int(original * factor), further)


def check_window(length: int, limit: int | None) -> None:
    """Check that a model reads windows of `length` tokens.

    Raises:
        SAEError: they are longer than its context.
    """
    if limit is not None and length > limit:
        raise SAEError(
            f"--max-text-length {length}: the model reads at most {limit} tokens (its config.json "
            "says so); use shorter windows"
        )
