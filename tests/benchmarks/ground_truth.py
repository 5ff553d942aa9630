"""How many known features each kind of SAE recovers, as a Markdown table.

    python tests/benchmarks/ground_truth.py

The penalties of the kinds without a k are such that about as many features are active.
"""

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/tools")]

import torch  # noqa: E402
from ground_truth import RECOVERED, KnownFeatures, learn, recovery  # noqa: E402

from sae_core.sae.config import SAEConfig  # noqa: E402
from sae_core.sae.kinds import KINDS  # noqa: E402
from sae_core.train_config import TrainingConfig  # noqa: E402

D_IN, N_FEATURES, N_ACTIVE, EXPANSION = 128, 512, 6, 8
N_TOKENS, TOKENS_PER_STEP, EPOCHS = 2**19, 1024, 2
RATES = (3e-3, 1e-2)
PENALTIES = {"standard": 0.3, "gated": 0.3}


def row(kind: str, lr: float) -> str:
    """One line of the table: a training from scratch."""
    source = KnownFeatures(
        d_in=D_IN,
        n_features=N_FEATURES,
        n_active=N_ACTIVE,
        n_tokens=N_TOKENS,
        tokens_per_step=TOKENS_PER_STEP,
    )
    config = SAEConfig(
        sae_type=kind,
        sae_expansion=EXPANSION,
        topk=N_ACTIVE,
        sparsity_penalty=PENALTIES.get(kind, 0.0),
    )
    start = time.perf_counter()
    trainer = learn(config, source, TrainingConfig(num_epochs=EPOCHS, lr=lr))
    seconds = time.perf_counter() - start
    found = recovery(trainer.sae.W_dec.detach(), source.directions)
    last = {name: column[-1] for name, column in trainer.history.items()}
    return (
        f"| `{kind}` | {lr:g} | {found.share:.1%} | {found.mean_cosine:.3f} "
        f"| {last['val_sparsity']:.1f} | {last['val_recon_loss']:.4f} "
        f"| {last['dead_feature_percentage']:.1f}% | {seconds:.0f} s |"
    )


def main() -> None:
    print(
        f"{N_FEATURES} known features in {D_IN} dimensions, {N_ACTIVE} active a token, "
        f"{D_IN * EXPANSION} features to find them with, {EPOCHS * N_TOKENS:,} tokens; "
        f"torch {torch.__version__}\n"
    )
    print(
        f"| kind | lr | recovered (cosine > {RECOVERED}) | mean cosine | L0 | FVU | dead | time |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for kind in KINDS:
        for lr in RATES:
            print(row(kind, lr), flush=True)


if __name__ == "__main__":
    main()
