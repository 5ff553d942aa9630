"""The whole way from chapters to SAEs: six SAEs on three layers, beside one, and six single runs.

The workflow reads all layers in one pass of the model; a single run reads its own activations from
the model, every epoch anew. Everything is timed as its user would start it, from an empty folder;
the model has been fetched before. Losses are local unless `--end-to-end` is given: the end-to-end
phase runs the model for every SAE by itself, wherever the activations come from.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from demo_model import ROOT, chapter_folders, demo_entry, demo_record
from machine import describe

LAYERS = (5, 9, 14)
SAES = ({"topk": 32, "sae_expansion": 8}, {"topk": 64, "sae_expansion": 4})
SETTINGS = {"num_epochs": 2, "tokens_per_step": 1024}
LENGTH = 256


def run(command: list[str], cwd: Path) -> float:
    """Seconds that a command takes."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: failed\n{done.stderr[-2000:]}")
    return time.perf_counter() - start


def workflow(
    chapters: Path, layers: tuple[int, ...], saes: tuple[dict, ...], end_to_end: bool
) -> float:
    """Seconds from chapters to the SAEs of a configuration."""
    config = {
        "chapters": {"folders": {path.name: str(path) for path in chapter_folders(chapters)}},
        "windows": {"max_text_length": LENGTH},
        "training": SETTINGS,
        "end_to_end": {"use_end_to_end": end_to_end},
        "models": [demo_entry() | {"layers": list(layers), "saes": list(saes)}],
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.yaml").write_text(yaml.safe_dump(config))
        names = [
            f"results/saes/{config['models'][0]['name']}.blocks.{layer}.hook_resid_post"
            f".btop{sae['topk']}sae.exp{sae['sae_expansion']}/weights.pt"
            for layer in layers
            for sae in saes
        ]
        snakefile = str(ROOT / "workflow/Snakefile")
        command = ["snakemake", "--snakefile", snakefile, "--configfile", "config.yaml"]
        return run([*command, "--cores", "all", "--quiet", "all", "--", *names], Path(folder))


def single_run(chapters: Path, layer: int, sae: dict, end_to_end: bool) -> float:
    """Seconds from chapters to one SAE, with the command lines."""
    script = ROOT / "sae_core/model_training/single_sae_training.py"
    with tempfile.TemporaryDirectory() as folder:
        texts = ["sae_core/data_processing/textbook_process.py", "--output", f"{folder}/texts.json"]
        texts += ["--folders", *map(str, chapter_folders(chapters))]
        options = SETTINGS | sae | {
            "model_name": demo_record().path,
            "hook_layer": layer,
            "data_path": "texts.json",
            "max_text_length": LENGTH,
            "output_root": "saes",
            "checkpoint_root": "checkpoints",
        }  # fmt: skip
        words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        words.append("--use-end-to-end" if end_to_end else "--no-use-end-to-end")
        processing = run([sys.executable, *texts], ROOT)
        return processing + run([sys.executable, str(script), *words], Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chapters", type=Path, default=Path("sae_core/data/raw_data"))
    parser.add_argument("--no-single-runs", action="store_true", help="the workflow alone")
    parser.add_argument("--end-to-end", action="store_true", help="with the end-to-end phase")
    options = parser.parse_args()
    demo_record()
    print(f"\nFrom chapters to SAEs ({describe('snakemake')})\n")
    chapters, end_to_end = options.chapters, options.end_to_end
    one = workflow(chapters, LAYERS[-1:], SAES[:1], end_to_end)
    six = workflow(chapters, LAYERS, SAES, end_to_end)
    print("| what | seconds | over one SAE |\n|---|--:|--:|")
    print(f"| workflow, 1 SAE | {one:.0f} | 1 |")
    print(f"| workflow, 6 SAEs on 3 layers | {six:.0f} | {six / one:.2f} |", flush=True)
    if not options.no_single_runs:
        singles = sum(
            single_run(chapters, layer, sae, end_to_end) for layer in LAYERS for sae in SAES
        )
        print(f"| 6 single runs | {singles:.0f} | {singles / one:.2f} |")


if __name__ == "__main__":
    main()
