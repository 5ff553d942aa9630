"""What identifies a tokenizer."""

import hashlib
import json
from pathlib import Path
from typing import Any

from sae_core.utils.files import file_sha256


def tokenizer_sha256(tokenizer: Any) -> str:
    """What identifies a tokenizer: a hash of all that decides how it reads a text, wherever its
    files lie. A chat template or a maximum length does not count."""
    if tokenizer.is_fast:
        reads = json.loads(tokenizer.backend_tokenizer.to_str())
        reads |= {"truncation": None, "padding": None}
    else:
        files = (getattr(tokenizer, name, None) for name in ("vocab_file", "merges_file"))
        hashes = [file_sha256(Path(file)) for file in files if file and Path(file).is_file()]
        reads = {"class": type(tokenizer).__qualname__, "files": hashes}
        reads["vocabulary"] = tokenizer.get_vocab()
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    described = json.dumps([reads, special], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(described.encode("utf-8", "surrogatepass")).hexdigest()
