"""Tokenised texts of the command lines: made once, and kept for every later run on the same texts
with the same tokenizer."""

import hashlib
from pathlib import Path
from typing import Any

from sae_core.corpus.token_file import TokenFile
from sae_core.corpus.tokenise import Corpus, tokenise
from sae_core.models.model_sources import cache_folder
from sae_core.models.tokenizers import tokenizer_sha256
from sae_core.utils.errors import SAEError
from sae_core.utils.run_lock import lock

PATIENCE = 24 * 3600.0
"""Seconds that a process waits for another one that tokenises the same texts."""


def cached_tokens(corpus: Corpus, tokenizer: Any, root: Path | str | None) -> TokenFile:
    """The tokens of a corpus, tokenised if that has not been done yet.

    Args:
        root: folder of the tokenised texts; by default `tokens` in the cache.

    Raises:
        SAEError: the texts cannot be read, or the tokens not written.
    """
    key = hashlib.sha256(f"{corpus.key} {tokenizer_sha256(tokenizer)}".encode()).hexdigest()[:24]
    folder = Path(root or cache_folder() / "tokens") / key
    with lock(folder.with_name(f".{key}.lock"), "is tokenising these texts", wait=PATIENCE):
        if folder.exists():
            try:
                return TokenFile.open(folder)
            except SAEError as error:
                print(f"{error}: tokenising the texts again", flush=True)
        tokenise(corpus, tokenizer, folder)
        return TokenFile.open(folder)
