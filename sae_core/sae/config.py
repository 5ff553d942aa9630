"""What an SAE is: the settings a user chooses, and the `config.json` that is stored with it."""

import json
import math
import re
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from sae_core.utils.errors import SAEError
from sae_core.utils.limits import (
    Filled,
    InConfiguration,
    Limits,
    NaturalFloat,
    PositiveInt,
    Share,
    Text,
    check_limits,
)
from sae_core.utils.naming import hook_label, hook_spec, without_paths
from sae_core.utils.records import fits, read_json

FloatType = Literal["float32", "float16", "bfloat16"]

SAEType = Literal[
    "batch_topk",
    "topk",
    "matryoshka_batch_topk",
    "multi_batch_topk",
    "jumprelu",
    "gated",
    "standard",
]

TAGS: dict[str, str] = {
    "batch_topk": "btop{k}sae",
    "topk": "top{k}sae",
    "matryoshka_batch_topk": "mat{k}sae",
    "multi_batch_topk": "multi{k}sae",
    "jumprelu": "jump{k}sae",
    "gated": "gatedsae",
    "standard": "sae",
}
"""What each kind is called in a run name; a kind with a k aims at that L0."""


MULTIPLES = (0.5, 1.0, 2.0)
"""Ascending multiples of k at which a `multi_batch_topk` SAE is trained."""


@dataclass(frozen=True)
class SAEConfig:
    """The SAE to train."""

    sae_type: SAEType = "batch_topk"
    """BatchTopK (arXiv 2412.06410), TopK (2406.04093), Matryoshka BatchTopK (2503.17547), BatchTopK
    trained at half, once and twice k together (Multi-TopK, 2406.04093), JumpReLU (2407.14435),
    Gated (2404.16014), or the standard ReLU SAE with an L1 penalty. Part of the run name."""

    sae_expansion: PositiveInt = 4
    """Number of features, as a multiple of the activation's width. Part of the run name."""

    sae_dtype: FloatType = "float32"
    """Number format of the exported weights; training itself is always in float32."""

    sparsity_penalty: NaturalFloat = 0.0
    """Weight in the loss of the L1 norm of the code (gated kind: of its gate). Without it the
    standard and gated kinds are not sparse."""

    topk: Annotated[int, InConfiguration(Limits(minimum=1))] = 128
    """L0 to train for: the mean number of active features per token. Part of the run name. Not for
    the standard and gated kinds."""

    matryoshka_fractions: Annotated[tuple[Share, ...], Filled()] = (0.0625, 0.125, 0.25, 0.5)
    """Ascending shares of the features, counted from the first, each of which has to reconstruct
    without the rest (Matryoshka BatchTopK). The whole SAE always has to."""

    topk_aux: PositiveInt | None = None
    """Dead features per token that the auxiliary loss uses; by default as many as --topk, or half
    the width of the activation for a kind without it."""

    n_batches_to_dead: PositiveInt = 200
    """A feature that has not fired for this many batches counts as dead."""

    n_tokens_to_dead: PositiveInt | None = None
    """The same limit in tokens; if given, it replaces the number of batches."""

    aux_penalty: NaturalFloat = 0.03125
    """Weight of the auxiliary loss on dead features."""

    init_from: Text | None = None
    """Begin with the weights of an SAE of the same hook instead of random ones: its directory (also
    one of SAELens or dictionary_learning), its run name, or owner/repository/run_name[@revision]
    on the Hub. It may be of any kind, and have fewer features: the others are random. `{layer}`
    stands for the layer's number. The run name gets `-ft` after the kind."""

    def __post_init__(self) -> None:
        check_limits(self)
        if "{k}" in TAGS[self.sae_type] and self.topk <= 0:
            raise SAEError(
                f"--topk {self.topk}: a {self.sae_type} SAE needs at least 1 active feature per "
                "token"
            )
        if not all(a < b for a, b in pairwise(self.matryoshka_fractions)):
            raise SAEError(
                f"--matryoshka-fractions {' '.join(map(str, self.matryoshka_fractions))}: give "
                "them in ascending order"
            )

    @property
    def k(self) -> int:
        """The L0 that the kind aims at; 0 for a kind without one."""
        return self.topk if "{k}" in TAGS[self.sae_type] else 0

    @property
    def trained_k(self) -> float:
        """Active features per token in the largest code of a training step; 0 without a k."""
        return self.k * (MULTIPLES[-1] if self.sae_type == "multi_batch_topk" else 1)

    @property
    def tag(self) -> str:
        """The SAE's kind in a run name, such as `btop<k>sae` or `sae`."""
        return TAGS[self.sae_type].format(k=self.topk) + ("-ft" if self.init_from else "")

    def origin(self, layer: int) -> str | None:
        """The SAE that the training of a layer's SAE begins with, if there is one."""
        return self.init_from and self.init_from.replace("{layer}", str(layer))

    def n_features(self, d_in: int) -> int:
        """The number of features of an SAE on activations of width `d_in`.

        Raises:
            SAEError: it is smaller than `topk`.
        """
        d_sae = d_in * self.sae_expansion
        if self.k > d_sae:
            raise SAEError(
                f"--topk {self.k}: the SAE has {d_sae} features; use fewer, or a larger "
                "--sae-expansion"
            )
        return d_sae

    def matryoshka_sizes(self, d_sae: int) -> list[int]:
        """The sizes of the nested SAEs, ending with the whole SAE; empty for every other kind."""
        if self.sae_type != "matryoshka_batch_topk":
            return []
        sizes = {max(1, round(share * d_sae)) for share in self.matryoshka_fractions}
        return sorted(sizes | {d_sae})


OUTLIER_NORMS = ("outlier_norm", "target_outlier_norm")
"""Entries of an SAE's `metadata`: the norms at its hook, and at a transcoder's target, beyond which
an activation is an outlier."""

METADATA: dict[str, Any] = {
    "model_name": str,
    "model_sha256": str,
    "max_text_length": int,
    "val_fraction": float,
    "seed": int,
    "excluded_tokens": list[str],
    **dict.fromkeys(OUTLIER_NORMS, float),
    "prepend_bos": bool,
    "init_from": dict[str, Any],
}
"""The entries of an SAE's `metadata` that are read, with their types."""

DTYPES = ("float32", "float16", "bfloat16", "float64")
"""Number formats that weights may have."""

NONE_IS_ZERO = ("top_k", "top_k_aux")
"""Keys that this trainer's predecessor wrote as null for an SAE of the standard kind."""


@dataclass
class SAESpec:
    """`config.json` of an SAE directory: what is needed to use the weights, and their origin.

    Directories in the older form load too. They have only the keys without a default, and were
    written by this trainer's predecessor or by its first version. Their kind follows from
    `top_k`. A directory without `target_hook_name` is an SAE.
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
    matryoshka_sizes: list[int] = field(default_factory=list)
    target_hook_name: str = ""
    """Where a transcoder's output belongs, in the same layer; empty for an SAE."""
    metadata: dict[str, Any] = field(default_factory=dict)
    weights_sha256: str = field(default="", compare=False)
    """SHA-256 of the `weights.pt` that belongs to this configuration."""

    def __post_init__(self) -> None:
        if not self.sae_type:
            self.sae_type = "batch_topk" if self.top_k > 0 else "standard"

    @property
    def is_older_form(self) -> bool:
        """Whether the configuration has no hash of its weights."""
        return not self.weights_sha256

    @property
    def target_hook_spec(self) -> str:
        """Full name of the hook that the output belongs to."""
        return hook_spec(self.hook_layer, self.target_hook_name or self.hook_name)

    @property
    def window(self) -> int:
        """Tokens per window of the training; 0 if that is not known."""
        return self.metadata.get("max_text_length") or 0

    @property
    def excluded_tokens(self) -> tuple[str, ...]:
        """Tokens that were left out of the training, as the tokenizer's vocabulary has them."""
        return tuple(self.metadata.get("excluded_tokens") or ())

    @property
    def outlier_norms(self) -> tuple[float, float]:
        """Norms at the hook and at the target beyond which an activation is an outlier, such as an
        attention sink: the training left it out. Of an SAE, which has no target, both are one;
        infinite where none is recorded."""
        known = [self.metadata.get(key) for key in OUTLIER_NORMS]
        at_hook, at_target = (math.inf if norm is None else norm for norm in known)
        return at_hook, at_target if self.target_hook_name else at_hook

    @property
    def site(self) -> str:
        """`hook_spec`, or `blocks.<layer>.<hook_name>-<target_hook_name>`."""
        return hook_spec(self.hook_layer, hook_label(self.hook_name, self.target_hook_name))

    def to_json(self) -> str:
        """The contents of `config.json`, without any path of this machine."""
        return json.dumps(without_paths(asdict(self)), indent=2) + "\n"

    @classmethod
    def load(cls, path: Path) -> "SAESpec":
        """Read a `config.json`; unknown keys are ignored.

        Raises:
            SAEError: the file is missing, is not JSON, lacks a key, or has a wrong value.
        """
        stored = read_json(path, "SAE configuration", "fetch or train the SAE again")
        known = {f.name for f in fields(cls)}
        optional = {"sae_type", "matryoshka_sizes", "target_hook_name", "metadata"}
        required = known - optional - {"weights_sha256"}
        if not isinstance(stored, dict) or required - set(stored):
            missing = sorted(required - set(stored if isinstance(stored, dict) else ()))
            raise SAEError(f"{path}: not an SAE configuration; missing {', '.join(missing)}")
        stored = _as_written_today(stored)
        for f in fields(cls):
            if f.name in stored and not fits(stored[f.name], f.type):
                raise SAEError(f"{path}: {f.name} is {stored[f.name]!r:.80}, not {_said(f.type)}")
        for name, kind in METADATA.items():
            value = stored.get("metadata", {}).get(name)
            if value is not None and not fits(value, kind):
                raise SAEError(f"{path}: metadata: {name} is {value!r:.80}, not {_said(kind)}")
        spec = cls(**{key: value for key, value in stored.items() if key in known})
        spec.check(path)
        return spec

    def check(self, path: Path) -> None:
        """Check that the values, which have the right types, make sense.

        Raises:
            SAEError: a value does not.
        """
        if min(self.d_in, self.d_sae) < 1:
            raise SAEError(f"{path}: d_in and d_sae must be at least 1")
        for name in ("hook_layer", "top_k", "top_k_aux", "n_batches_to_dead"):
            if getattr(self, name) < 0:
                raise SAEError(f"{path}: {name} is {getattr(self, name)}; it must be at least 0")
        if self.hook_spec != hook_spec(self.hook_layer, self.hook_name):
            raise SAEError(
                f"{path}: hook_spec is {self.hook_spec!r:.80}, but hook_layer is {self.hook_layer} "
                f"and hook_name {self.hook_name!r:.80}; put right what is wrong"
            )
        if self.top_k > self.d_sae:
            raise SAEError(f"{path}: top_k is {self.top_k}, and there are {self.d_sae} features")
        for name in ("l1_coefficient", "aux_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise SAEError(
                    f"{path}: {name} is {getattr(self, name)}, which is not a finite number"
                )
        for name in OUTLIER_NORMS:
            norm = self.metadata.get(name)
            if norm is not None and not norm > 0:
                raise SAEError(f"{path}: metadata: {name} is {norm}; it must be above 0")
        if self.dtype not in DTYPES:
            raise SAEError(f"{path}: dtype is {self.dtype!r:.80}; it has to be {', '.join(DTYPES)}")
        check_sizes(path, "matryoshka_sizes", self.matryoshka_sizes, self.d_sae)


def _said(kind: Any) -> str:
    """What a value of a type is in JSON."""
    named: dict[Any, str] = {int: "a whole number", float: "a number", str: "text"}
    named |= {
        bool: "true or false",
        list[int]: "a list of whole numbers",
        list[str]: "a list of texts",
    }
    return named.get(kind, "an object")


def check_sizes(path: Path, key: str, sizes: list[int], d_sae: int) -> None:
    """Check the sizes of nested SAEs; there may be none.

    Raises:
        SAEError: they do not increase to the size of the whole SAE.
    """
    if sizes and not (sizes[-1] == d_sae and all(a < b for a, b in pairwise((0, *sizes)))):
        raise SAEError(
            f"{path}: {key} is {sizes!r:.80}; it must increase to {d_sae}, the size of the whole "
            "SAE"
        )


def _as_written_today(stored: dict[str, Any]) -> dict[str, Any]:
    """The values of a `config.json` in today's form. This trainer's predecessor wrote a layer as
    text, a number format with its module, and null for no k."""
    stored = dict(stored)
    layer, dtype = stored["hook_layer"], stored["dtype"]
    if isinstance(layer, str) and re.fullmatch("[0-9]{1,9}", layer):
        stored["hook_layer"] = int(layer)
    if isinstance(dtype, str):
        stored["dtype"] = dtype.removeprefix("torch.")
    return stored | {key: 0 for key in NONE_IS_ZERO if stored[key] is None}
