"""What an SAE is: the settings a user chooses, and the `config.json` that is stored with it."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from sae_core.errors import SAEError

FloatType = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class SAEConfig:
    """The SAE that is to be trained."""

    sae_type: Literal["batch_topk", "standard"] = "batch_topk"
    """BatchTopK (arXiv 2412.06410), or the standard ReLU SAE with an L1 penalty."""

    sae_expansion: int = 4
    """Number of features, as a multiple of the activation's width."""

    sae_dtype: FloatType = "float32"
    """Number format of the exported weights; training itself is always in float32."""

    sparsity_penalty: float = 0.0
    """Weight of the L1 norm of the code in the loss."""

    topk: int = 128
    """Mean number of active features a token (BatchTopK)."""

    topk_aux: int | None = None
    """Dead features a token that the auxiliary loss uses; by default half the width of the
    activation."""

    n_batches_to_dead: int = 200
    """A feature that has not fired for this many batches counts as dead."""

    aux_penalty: float = 0.03125
    """Weight of the auxiliary loss on dead features."""

    def __post_init__(self) -> None:
        if self.sae_type == "batch_topk" and self.topk <= 0:
            raise SAEError(
                f"--topk {self.topk}: a batch_topk SAE needs at least 1 active feature a token"
            )
        if self.topk_aux is not None and self.topk_aux <= 0:
            raise SAEError(f"--topk-aux {self.topk_aux}: must be at least 1")
        for name in ("sae_expansion", "n_batches_to_dead"):
            if getattr(self, name) < 1:
                raise SAEError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 1")
        for name in ("sparsity_penalty", "aux_penalty"):
            if getattr(self, name) < 0:
                raise SAEError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: must not be negative"
                )

    @property
    def tag(self) -> str:
        """The SAE's kind in a run name: `btop<k>sae` or `sae`."""
        return f"btop{self.topk}sae" if self.sae_type == "batch_topk" else "sae"


@dataclass
class SAESpec:
    """`config.json` of an SAE directory: what is needed to use the weights, and their origin.

    Directories that were written before `sae_type` and `metadata` existed load too: their kind
    follows from `top_k`.
    """

    d_in: int
    d_sae: int
    l1_coefficient: float
    dtype: str
    device: str
    hook_layer: int
    hook_name: str
    hook_spec: str
    top_k: int
    top_k_aux: int
    n_batches_to_dead: int
    aux_penalty: float
    sae_type: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.sae_type:
            self.sae_type = "batch_topk" if self.top_k > 0 else "standard"

    def to_json(self) -> str:
        """The contents of `config.json`."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def load(cls, path: Path) -> "SAESpec":
        """Read a `config.json`; keys that this version does not know are left out.

        Raises:
            SAEError: the file is missing, not JSON, or lacks a key.
        """
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SAEError(f"{path}: not a readable SAE configuration ({error})") from error
        known = {f.name for f in fields(cls)}
        required = known - {"sae_type", "metadata"}
        if not isinstance(stored, dict) or required - set(stored):
            missing = sorted(required - set(stored if isinstance(stored, dict) else ()))
            raise SAEError(f"{path}: not an SAE configuration; missing {', '.join(missing)}")
        for f in fields(cls):
            if f.name in stored and not _fits(stored[f.name], f.type):
                raise SAEError(f"{path}: {f.name} is {stored[f.name]!r}, which is no {f.type}")
        if min(stored["d_in"], stored["d_sae"]) < 1:
            raise SAEError(f"{path}: d_in and d_sae must be at least 1")
        return cls(**{key: value for key, value in stored.items() if key in known})


def _fits(value: Any, kind: Any) -> bool:
    if kind is float:
        return isinstance(value, int | float)
    return isinstance(value, dict if kind not in (int, str) else kind)
