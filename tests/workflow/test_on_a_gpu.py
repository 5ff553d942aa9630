"""The commands that compute, on a pretended GPU: no operation mixes tensors there with others, and
the results are those of a CPU.

A training's backward pass runs out of its sight, but not its forward pass, whose tensors it takes.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend_gpu import GPU, OnGPU, PretendGPU
from running import run_here, run_python

from sae_core.formats.checkpoint import load_sae
from sae_core.sae.sparse_ops import Weights, decode, encode

PRETEND = "tests/tools/pretend_gpu.py"
TOKENIZE = "scripts/tokenize_corpus.py"
HOOK = "blocks.1.hook_resid_post"
TRAINING = "--num-epochs 2 --max-text-length 32 --tokens-per-step 256 --sae-expansion 4 --topk 4"


def test_the_pretended_gpu_is_as_strict_as_a_real_one() -> None:
    with PretendGPU():
        here, there = torch.ones(3), torch.ones(3, device=GPU)
        assert there.device == (there + torch.tensor(1.0)).device == here.to(there).device == GPU
        assert there.cpu().device.type == "cpu" and not isinstance(there.cpu(), OnGPU)
        for mixed in (lambda: here + there, lambda: torch.cat([here, there]), there.numpy):
            with pytest.raises((RuntimeError, TypeError), match="same device|to NumPy"):
                mixed()


@pytest.mark.parametrize("lower_bound", [0.0, 0.5])
def test_the_sparse_operations_for_a_gpu_are_those_for_a_cpu(lower_bound: float) -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = (8, 32), (32,), (32, 8), (8,)
    drawn = [torch.randn(shape, generator=draw) for shape in shapes]
    x = torch.randn(20, 8, generator=draw)

    def results(device: torch.device) -> list[torch.Tensor]:
        weights = Weights(*(w.clone().to(device).requires_grad_() for w in drawn))
        there = x.to(device)
        code = encode(there, weights, 60, lower_bound=lower_bound)
        (decode(code, weights) - there).pow(2).sum().backward()
        return [t.cpu() for t in (code.value.detach(), *(w.grad for w in weights))]

    expected = results(torch.device("cpu"))
    with PretendGPU():
        found = results(GPU)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.as_subclass(torch.Tensor), b)


@pytest.fixture(scope="module")
def record(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("record") / "tiny.json"
    run_here("scripts/fetch.py", "--name", "tiny", "--path", tiny_model, "--output", path)
    return path


def run_on(device: str, *command: object) -> None:
    """Run a command; a pretended GPU needs a process of its own."""
    if device == "cuda":
        run_python(PRETEND, *command)
    else:
        run_here(*command)


def made_on(device: str, folder: Path, record: Path, texts: Path) -> dict[str, Any]:
    """Harvest, train, evaluate and analyse; what the evaluation says."""
    tokens = folder / "tokens"
    model = json.loads(record.read_text())["path"]
    run_here(TOKENIZE, "--data-path", texts, "--tokenizer", model, "--output", tokens)
    given = ["--tokens", tokens, "--record", record, "--device", device, "--batch-size", 4]
    given += ["--model-dtype", "float32"]  # `auto` depends on the processor
    shard, sae, points = folder / "shard", folder / "sae", folder / "points"
    windows = "--max-text-length 32 --passes 1 --shard 0 --shards 1".split()
    receipt = ["--output", shard, "--receipt", folder / "receipt.json"]
    run_on(device, "scripts/harvest.py", *given, "--hooks", HOOK, *windows, *receipt)
    output = ["--checkpoints", points, "--output", sae, "--end-to-end-fraction", 0.5]
    training = [*TRAINING.split(), "--use-block-mse", *output]
    run_on(device, "scripts/train.py", *given, "--shards", shard, "--hook", HOOK, *training)
    to = ["--sae", sae, "--checkpoints", points, "--output", folder / "evaluation.json"]
    run_on(device, "scripts/evaluate.py", *given, *to)
    to = [f"--{name}={folder / name}" for name in ("entries", "table", "corpus")]
    run_on(device, "scripts/features.py", *given, "--sae", sae, *to)
    return json.loads((folder / "evaluation.json").read_text())


@pytest.mark.slow
def test_the_workflows_commands_do_on_a_gpu_what_they_do_on_a_cpu(
    record: Path, data_path: Path, tmp_path: Path
) -> None:
    there, here = (
        made_on(device, tmp_path / device, record, data_path) for device in ("cuda", "cpu")
    )
    # There more is multiplied in bfloat16, and small differences grow in training.
    for name in ("fvu", "l0", "ce_sae", "kl"):
        assert there[name] == pytest.approx(here[name], rel=0.03), name
    weights = [load_sae(tmp_path / device / "sae").W_dec for device in ("cuda", "cpu")]
    assert (weights[0] - weights[1]).abs().max() < 0.05
    assert (tmp_path / "cuda/entries").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["matryoshka_batch_topk", "jumprelu", "gated"])
def test_a_single_run_of_every_sort_of_kind(
    kind: str, tiny_model: Path, data_path: Path, tmp_path: Path
) -> None:
    """Small differences grow in training, so that only the error is compared."""
    options = [*TRAINING.split(), "--model-name", tiny_model, "--data-path", data_path]
    options += ["--model-dtype", "float32"]
    options += ["--sae-type", kind, *(["--sparsity-penalty", "0.01"] if kind == "gated" else [])]
    errors = {}
    for device in ("cuda", "cpu"):
        folder = tmp_path / device
        places = ["--output-root", folder, "--checkpoint-root", folder / "points"]
        script = "sae_core/model_training/single_sae_training.py"
        run_on(device, script, *options, *places, "--run-name", "r", "--device", device)
        history = json.loads((folder / "r/history.json").read_text())
        errors[device] = history["recon_loss"][-1]
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=0.02)
