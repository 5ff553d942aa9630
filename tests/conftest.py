"""What several tests share: a tiny model on disk, some texts, and the way to run a command."""

import atexit
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "tools"))

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # other tests need the core of a thread that waits
if not list(Path("/dev").glob("nvidia[0-9]*")):  # Triton then runs its kernels in Python
    os.environ["TRITON_INTERPRET"] = "1"

# What Python compiles is kept, in copies of the project too: it is read hundreds of times.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# No test leaves anything in the user's cache.
os.environ["SAE_CORE_TOKENS"] = tempfile.mkdtemp(prefix="tokens-")
atexit.register(shutil.rmtree, os.environ["SAE_CORE_TOKENS"], ignore_errors=True)

import preloaded  # noqa: E402, F401  (its servers are those of all of pytest's workers)
from made_once import made_once  # noqa: E402
from running import Run, run_python  # noqa: E402

LONGEST = (
    *("test_demo", "test_slurm_faults", "test_slurm", "test_scale", "test_deployment"),
    *("test_publish", "test_chaos", "test_parallel", "test_rebuild", "test_killed_training"),
    *("test_resume", "test_lockstep", "test_bad_input", "test_on_a_gpu", "test_engines"),
    *("test_commands", "test_transcoder", "test_without_a_store", "test_labels", "test_gpus"),
    "test_wandb",
)
"""The files whose tests take longest, in the order in which they start: a long test that began at
the end would leave the other cores without work. A worker with few tests left gets its next one
ahead, so a short one waits for the first to end."""


def pytest_xdist_auto_num_workers() -> int:
    """Two more than there are cores: many tests wait, for processes, servers and time limits."""
    return len(os.sched_getaffinity(0)) + 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


def pytest_configure(config: pytest.Config) -> None:
    # sparse_ops silences it, but pytest puts filters of its own in place.
    config.addinivalue_line("filterwarnings", "ignore:Sparse CSR tensor support is in beta state")
    # The Hub's client and its HTTP library disagree about a name.
    config.addinivalue_line("filterwarnings", "ignore:Use 'content=<...>' to upload raw")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Paragraphs of one of the sample chapters."""
    chapter = ROOT / "sae_core/data/raw_data/physics_chapters/chapter_01.md"
    paragraphs = chapter.read_text(encoding="utf-8").split("\n\n")
    return [p for p in paragraphs if len(p) > 200][:24]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """The directory of a tiny random Qwen3 model, the same for all tests; not to be changed."""

    def make(folder: Path) -> None:
        from tiny_model import make_tiny_model

        make_tiny_model(folder, " ".join(texts))

    return made_once(tmp_path_factory, "tiny", make)


@pytest.fixture
def data_path(tmp_path: Path, texts: list[str]) -> Path:
    """A processed data file."""
    path = tmp_path / "texts.json"
    path.write_text(json.dumps(texts))
    return path


@pytest.fixture(scope="session")
def run() -> Run:
    """The way to run a command; see `running.run_python`."""
    return run_python
