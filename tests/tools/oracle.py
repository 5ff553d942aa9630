"""Features that fire on one word each, and language models that know it, or do not."""

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

FILLER = tuple(f" f{n}" for n in range(60))
N_TOKENS = 12


def word(feature: int) -> str:
    """The word that a feature is active on."""
    return f"word{feature}"


def window(feature: int, text: int, value: float) -> dict[str, Any]:
    """A window as the file of features has it, with the feature's word in it."""
    chance = random.Random(f"{feature} {text}")
    tokens, peak = chance.choices(FILLER, k=N_TOKENS), chance.randrange(1, N_TOKENS)
    tokens[peak] = word(feature)
    activations = [value if i == peak else 0 for i in range(N_TOKENS)]
    place = {"text": text, "chapter": None, "subject": None, "position": peak + 5, "peak": peak}
    return place | {"tokens": tokens, "activations": activations}


def entry(feature: int, n_top: int = 8) -> dict[str, Any]:
    """A line of the file of features."""
    windows = [window(feature, 100 * feature + n, 9.0 - n / 2) for n in range(n_top + 2)]
    quantiles = [{"quantile": q} | w for q, w in zip((0.5, 0.25), windows[n_top:], strict=True)]
    return {
        "feature": feature,
        "why": "strong",
        "promoted": [[f" next{feature}", 1.0]],
        "neighbours": [],
        "partners": [],
        "top": windows[:n_top],
        "quantiles": quantiles,
    }


def write_entries(path: Path, n: int) -> Path:
    """A file of `n` features."""
    path.write_text("".join(f"{json.dumps(entry(feature))}\n" for feature in range(n)))
    return path


def windows_of(user: str) -> list[str]:
    """The numbered windows of a request."""
    found = re.findall(r'^\d+\. (?:[\d.]+  )?(".*")$', user, re.MULTILINE)
    return [json.loads(text) for text in found]


def label(user: str) -> dict[str, Any]:
    """A good label: the word that is marked most often."""
    [(marked, _)] = Counter(re.findall(r"<<(\w+)>>", user)).most_common(1)
    return {"label": marked, "description": f"the word {marked}", "confidence": 0.9}


def judgement(user: str) -> dict[str, Any]:
    """What a perfect scorer says: the word that the feature is said to fire on is there, or, if
    tokens are marked, is marked."""
    [described] = re.findall(r"^The feature: (\w+)", user)
    texts = windows_of(user)
    wanted = f"<<{described}>>" if any("<<" in text for text in texts) else described
    return {"active": [bool(re.search(rf"{wanted}(?!\d)", text)) for text in texts]}


def answer(user: str) -> dict[str, Any]:
    """What a perfect labeller and scorer answers to a request."""
    return judgement(user) if user.startswith("The feature: ") else label(user)
