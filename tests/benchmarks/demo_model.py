"""The model and the texts that the benchmarks share: SmolLM2-135M as the demo has it, chapters."""

import json
from pathlib import Path

import yaml

from sae_core.data_processing.textbook_process import ProcessConfig, process
from sae_core.models.language_model import LanguageModel
from sae_core.models.model_sources import FetchConfig, ModelRecord, SourceConfig, fetch
from sae_core.train_config import ModelConfig
from sae_core.utils.devices import pick_device

ROOT = Path(__file__).resolve().parents[2]


def chapter_folders(root: Path) -> list[Path]:
    """The folders below `root` that hold chapters, one a subject."""
    return sorted({path.parent.resolve() for path in root.glob("*/*.md")})


def read_chapters(root: Path, scratch: Path) -> list[str]:
    """The chapters' paragraphs, by way of a file in `scratch`."""
    output = scratch / "texts.json"
    process(ProcessConfig(folders=tuple(chapter_folders(root)), output=output))
    return json.loads(output.read_text(encoding="utf-8"))


def demo_entry() -> dict:
    """The demo's model, as its configuration has it."""
    return yaml.safe_load((ROOT / "config/demo.yaml").read_text(encoding="utf-8"))["models"][0]


def demo_record() -> ModelRecord:
    """SmolLM2-135M-Instruct, fetched if it is not there."""
    entry = demo_entry()
    return fetch(FetchConfig(entry["name"], source=SourceConfig(**entry["source"])))


def demo_model(dtype: str = "auto") -> LanguageModel:
    """The model, in a number format."""
    config = ModelConfig(model_name=demo_record().path, model_dtype=dtype)
    return LanguageModel.load(config, pick_device("auto"))
