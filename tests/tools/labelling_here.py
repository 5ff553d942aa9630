"""Labels by a service or a model in this process."""

import asyncio
from pathlib import Path
from typing import Any

import oracle
from running import ROOT, run_here

from sae_core.labelling.asking import Asker
from sae_core.labelling.config import AskingConfig, LabellerConfig
from sae_core.labelling.endpoint import Endpoint
from sae_core.labelling.labeller import Labeller
from sae_core.labelling.labels import Label
from sae_core.labelling.ledger import Ledger
from sae_core.labelling.windows import Pool
from sae_core.utils.records import read_json_lines

SCRIPT = ROOT / "scripts/label.py"
N = 6
PER_FEATURE = 5
"""Requests: the label, and ten windows in two requests each for detection and fuzzing."""


def answer(body: dict[str, Any]) -> Any:
    return oracle.answer(body["messages"][1]["content"])


class Run:
    """Labels of a few features by the service, in this process, with waits that are only noted."""

    def __init__(self, folder: Path, n: int = N, **asking: Any) -> None:
        self.entries = oracle.write_entries(folder / "entries.jsonl", n)
        self.answers = folder / "answers.jsonl"
        self.asking = AskingConfig(**{"request_seconds": 5, "request_tries": 4} | asking)
        self.waits: list[float] = []

    def labels(self, **config: Any) -> list[Label]:
        settings = LabellerConfig(labeller="m", **config)
        entries = list(read_json_lines(self.entries))

        async def run() -> list[Label]:
            chat = Endpoint(settings, self.asking)
            ledger = Ledger(self.answers, settings)
            self.asker = Asker(chat, ledger, self.asking.request_tries, self.wait)
            materials = map(Pool(entries, 0).material, entries)
            labeller = Labeller(self.asker, settings)
            return await labeller.run(materials, self.asking.requests_at_once, lambda: None)

        return asyncio.run(run())

    async def wait(self, seconds: float) -> None:
        self.waits.append(seconds)


def label_here(folder: Path, *options: str, n: int = N, ok: bool = True) -> str:
    """The command, and all that it prints."""
    entries = oracle.write_entries(folder / "entries.jsonl", n)
    places = ["--entries", entries, "--labels", folder / "labels.jsonl"]
    places += ["--table", folder / "labels.csv", "--answers", folder / "answers.jsonl"]
    done = run_here(SCRIPT, *places, "--labeller", "m", *options, ok=ok)
    return done.stdout + done.stderr


def all_are_good(labels: list[Label]) -> bool:
    return [label[1:] for label in labels] == [
        (oracle.word(f), f"the word {oracle.word(f)}", 0.9, 1.0, 1.0, "ok") for f in range(N)
    ]
