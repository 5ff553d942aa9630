"""GPU memory of a training step of fixed sizes, of an SAE with a top-k (`trainer/static_step.py`).

A training keeps weights, the optimizer's moments and copies of the weights in bfloat16. A step
needs more only while it runs, and trainings in one process share that memory. With N tokens of
width d, F features, M nested codes (1 without any), and P pairs of the top-k and of the auxiliary
loss, it is most at one of three points:

    in all of them   x in float32 and bfloat16, and what is wanted     10 N d
                     the pairs: rows, features, values, their order    40 P
    selection        pre-activations in bfloat16                       2 N F
                     with float32 values, candidates                   24 P
                     or of a TopK SAE those in float32, too            4 N F
    nested losses    reconstructions, errors, gradients                4 N d (3 M + 6)
    gradients        of the weights                                    8 F d
                     segments of features with more than 128 pairs     16 d P / 128
                     dL/dx_hat of all codes, in float32                4 N d (M + 1)
                     and, as pairs read it, in bfloat16                2 N d (M + 1)

With bfloat16 values, a code of which more than `DENSE_SHARE` is active has no segments, and is
there as two matrices, of values and of their gradients, with the latter's sum over the codes:
2 N F (2 (M + 1) + 1).
"""

from sae_core.sae.config import MULTIPLES, SAEConfig

AUXILIARY_STRIDE, SEGMENT, DENSE_SHARE = 4, 128, 0.01
"""As in `trainer/objective.py`, `sae/static/pair_kernels.py` and `sae/dense_ops.py`, which need
torch."""

PAIR_BYTES = 40

STATIC_KINDS = "batch_topk", "matryoshka_batch_topk", "multi_batch_topk", "topk"
"""As in `trainer/ahead.py`."""


def step_bytes(sae: SAEConfig, d: int, n_tokens: int, exact: bool) -> float:
    """Bytes that a step needs while it runs; 0 of a kind without such a step.

    Args:
        d: width of the activations.
        n_tokens: of a step.
        exact: whether values are in float32.
    """
    if sae.sae_type not in STATIC_KINDS:
        return 0.0
    width, tokens = sae.n_features(d), 4 * n_tokens * d
    at_several_k = sae.sae_type == "multi_batch_topk"
    nested = len(MULTIPLES if at_several_k else sae.matryoshka_sizes(width))
    n_codes, code = max(1, nested), 2 * n_tokens * width
    n_aux = -(-n_tokens // AUXILIARY_STRIDE) * min(sae.topk_aux or sae.k, width)
    n_pairs = n_tokens * sae.trained_k + n_aux
    always = 2.5 * tokens + PAIR_BYTES * n_pairs
    selection = float(code)
    if exact:
        selection += 2 * code if sae.sae_type == "topk" else 24 * n_pairs
    losses = tokens * (3 * nested + 6) if nested else 0
    gradients = 8 * width * d + tokens * (n_codes + 1) * (1 if exact else 1.5)
    if not exact and sae.trained_k > DENSE_SHARE * width * n_codes:
        gradients += code * (2 * (n_codes + 1) + 1)
    else:
        gradients += 16 * d * n_pairs / SEGMENT
    return always + max(selection, losses, gradients)
