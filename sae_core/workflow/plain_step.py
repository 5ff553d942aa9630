"""What a training step costs that has no fixed sizes: operations and memory.

`gpu_step.py` has the memory of steps that have. Of N tokens of width d and F features, per token:

* The encoder product takes 2 d F operations, and every pair of the largest code 8 d: two for the
  reconstruction and for each of three gradients (`sae/sparse_ops.py`). There are k pairs, or 2 k of
  `multi_batch_topk`.
* A JumpReLU SAE has k pairs in the end. In the first step there are `active_at_start`, and
  `near_at_start` in one of the four products, which the gradient of the thresholds needs. A
  training adds `THINNING` of the first step to each of its steps. A GPU multiplies so dense a code
  as a matrix, unless values are in float32.
* Dense codes take further products of 2 d F: five for `standard`, seven for `gated`, whose gate is
  decoded, too.

Memory besides the state of the training, which contains the weights' gradient, with values in
float32:

    standard    12 N F + 12 N d        the code, its gradient and that of the penalty
    gated       25 N F + 12 N d
    jumprelu    64 N near + 40 N active + 20 N d, on a GPU also two row blocks

With values in bfloat16 a dense code takes half. A pair's bytes are those of a process, which takes
up to a third more than its tensors (docs/benchmarks.md, "Memory of a step"). A step with a top-k
takes a few row blocks of 34 MB on a CPU, which are not counted.
"""

from sae_core.sae.config import SAEConfig
from sae_core.sae.dense_start import active_at_start, near_at_start

THINNING = 0.14
"""Pairs beyond k, on average over the steps of a training, as a share of the first step's, as was
measured: docs/benchmarks.md, "Memory of a step"."""

DENSE_PRODUCTS = {"standard": 5, "gated": 7}
"""Products with dense codes, besides the encoder product."""

CODE_BYTES = {"standard": 12, "gated": 25}
"""Of every entry of a dense code, with values in float32."""

NEAR_BYTES, ACTIVE_BYTES = 64, 40
"""Of a pair that is near a threshold, and besides of one that is above it."""

GPU_BLOCK = 2**28
"""A row block on a GPU, in bytes: `GPU_FACTOR * BLOCK_BYTES` of `sae/largest_entries.py`, which
needs torch."""


def dense_flops(sae: SAEConfig, d: int, as_matrix: bool) -> float:
    """Operations per token on entries of a dense code, averaged over a training.

    Args:
        d: width of the activations.
        as_matrix: whether a code of pairs is multiplied as a matrix where it is dense.
    """
    product = 2 * d * sae.n_features(d)
    if sae.sae_type == "jumprelu" and as_matrix:
        return (1 + 4 * THINNING) * product
    return (1 + DENSE_PRODUCTS.get(sae.sae_type, 0)) * product


def pair_flops(sae: SAEConfig, d: int, as_matrix: bool) -> float:
    """Operations per token on pairs, averaged over a training. Arguments as those of
    `dense_flops`."""
    flops = 8 * d * sae.trained_k
    if sae.sae_type == "jumprelu" and not as_matrix:
        width = sae.n_features(d)
        near, active = near_at_start(d, width, sae.k), active_at_start(width, sae.k)
        flops += THINNING * d * (2 * near + 6 * active)
    return flops


def step_bytes(sae: SAEConfig, d: int, n_tokens: int, exact: bool, is_cpu: bool) -> float:
    """Bytes that the largest step needs besides the training's state; 0 of a kind with a top-k.

    Args:
        d: width of the activations.
        n_tokens: of a step.
        exact: whether values are in float32.
    """
    width = sae.n_features(d)
    if sae.sae_type in CODE_BYTES:
        code = CODE_BYTES[sae.sae_type] * (1 if exact else 0.5)
        return n_tokens * (code * width + 12 * d)
    if sae.sae_type != "jumprelu":
        return 0.0
    near, active = near_at_start(d, width, sae.k), active_at_start(width, sae.k)
    pairs = NEAR_BYTES * near + ACTIVE_BYTES * active
    return n_tokens * (pairs + 20 * d) + (0 if is_cpu else 2 * GPU_BLOCK)
