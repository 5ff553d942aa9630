"""What a training starts from: activations, settings, and the configuration of its SAE."""

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch

from sae_core.activations.shared_stream import SharedSource
from sae_core.activations.store import ActivationSource
from sae_core.activations.token_windows import TokenWindows
from sae_core.corpus.token_manifest import TokenManifest
from sae_core.distributed.process_group import ProcessGroup
from sae_core.models.language_model import Hook
from sae_core.models.model_sources import ModelRecord
from sae_core.pretrained import Origin
from sae_core.sae.config import SAEConfig, SAESpec
from sae_core.train_config import DataConfig, EndToEndConfig, RuntimeConfig, TrainingConfig
from sae_core.trainer.end_to_end import EndToEnd, ModelOrLoad
from sae_core.trainer.schedule import SAESize, resolved


@dataclass(frozen=True)
class Provenance:
    """What an SAE was made from, as its `config.json` records it."""

    model_name: str
    model_commit: str | None
    model_dtype: str
    data_file: str
    data_sha256: str
    prepend_bos: bool
    model_sha256: str | None = None
    """Of the model's files, where it has no commit."""

    @classmethod
    def recorded(
        cls, record: ModelRecord, texts: TokenManifest, dtype: str, prepend_bos: bool
    ) -> "Provenance":
        """What the workflow's records say.

        Args:
            dtype: of the model's activations.
        """
        return cls(
            model_name=record.name,
            model_commit=record.commit,
            model_dtype=dtype,
            data_file=texts.data_file,
            data_sha256=texts.data_sha256,
            prepend_bos=prepend_bos,
            model_sha256=record.model_sha256,
        )

    def as_metadata(self) -> dict[str, Any]:
        """What `config.json` says of it."""
        metadata = asdict(self)
        if self.model_sha256 is None:
            del metadata["model_sha256"]
        return metadata


@dataclass(frozen=True)
class Activations:
    """What an SAE is trained on."""

    source: ActivationSource
    hook: Hook
    d_in: int
    provenance: Provenance
    target: Hook | None = None
    """Of a transcoder; `source` then has the activations at both hooks."""
    model: ModelOrLoad | None = None
    """What they are of; only an end-to-end phase needs it, and its windows."""
    windows: TokenWindows | None = None
    model_files: str | None = None
    """A stamp of the language model's files, where it has no commit."""
    origin: Origin | None = None
    """The SAE that the training begins with; None for random weights."""


@dataclass(frozen=True)
class Settings:
    """How an SAE is trained."""

    sae: SAEConfig = field(default_factory=SAEConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    end_to_end: EndToEndConfig = field(default_factory=lambda: EndToEndConfig(use_end_to_end=False))
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    @classmethod
    def of(cls, options: Any) -> "Settings":
        """These groups of a command line's options."""
        return cls(**{group.name: getattr(options, group.name) for group in fields(cls)})


def end_to_end_phase(
    activations: Activations, settings: Settings, group: ProcessGroup
) -> EndToEnd | None:
    """The losses of the end-to-end phase, if the settings ask for one."""
    if not settings.end_to_end.use_end_to_end:
        return None
    assert activations.model is not None and activations.windows is not None
    source = activations.source
    return EndToEnd(
        activations.model,
        activations.windows,
        activations.hook,
        settings.end_to_end,
        settings.runtime.batch_size,
        activations.target,
        group,
        source.stream if isinstance(source, SharedSource) else None,
    )


def resolved_training(activations: Activations, settings: Settings) -> TrainingConfig:
    """The settings of the training, with numbers in place of `auto`."""
    source, sae, d_in = activations.source, settings.sae, activations.d_in
    size = SAESize(sae.sae_type, d_in, sae.n_features(d_in), sae.k)
    return resolved(settings.training, size, source.tokens_per_step, source.steps_per_epoch)


def resolved_spec(activations: Activations, settings: Settings, device: torch.device) -> SAESpec:
    """The stored configuration of the SAE to train, with all that it is made from."""
    sae, training = settings.sae, resolved_training(activations, settings)
    metadata = activations.provenance.as_metadata() | asdict(settings.data)
    if not settings.data.excluded_tokens:
        del metadata["excluded_tokens"]
    metadata["training"] = asdict(training)
    assert (activations.origin is None) == (sae.init_from is None), "see trainer/origin.py"
    if activations.origin:
        metadata["init_from"] = activations.origin.as_metadata()
    if settings.end_to_end.use_end_to_end:
        metadata["end_to_end"] = asdict(settings.end_to_end)
        if settings.end_to_end.end_to_end_stride == 1:  # as before there was a choice
            del metadata["end_to_end"]["end_to_end_stride"]
    if sae.n_tokens_to_dead:
        n_batches = max(1, sae.n_tokens_to_dead // int(training.tokens_per_step))
        sae = replace(sae, n_batches_to_dead=n_batches)
    return sae_spec(sae, activations.hook, activations.d_in, device, metadata, activations.target)


def sae_spec(
    sae: SAEConfig,
    hook: Hook,
    d_in: int,
    device: torch.device,
    metadata: dict[str, Any],
    target: Hook | None = None,
) -> SAESpec:
    """The stored configuration of the SAE that `sae` asks for, on activations of width `d_in`."""
    d_sae = sae.n_features(d_in)
    return SAESpec(
        d_in=d_in,
        d_sae=d_sae,
        l1_coefficient=sae.sparsity_penalty,
        dtype=sae.sae_dtype,
        device=str(device),
        hook_layer=hook.layer,
        hook_name=hook.hook_name,
        hook_spec=hook.spec,
        top_k=sae.k,
        top_k_aux=sae.topk_aux or sae.k or max(1, d_in // 2),
        n_batches_to_dead=sae.n_batches_to_dead,
        aux_penalty=sae.aux_penalty,
        sae_type=sae.sae_type,
        matryoshka_sizes=sae.matryoshka_sizes(d_sae),
        target_hook_name=target.hook_name if target else "",
        metadata=metadata,
    )


def warn_of_density(sae: SAEConfig) -> None:
    """Say so if nothing will make the SAE sparse."""
    if not sae.k and not sae.sparsity_penalty:
        print(
            f"--sparsity-penalty 0: nothing makes a {sae.sae_type} SAE sparse, and many of its "
            "features will be active on every token; give a penalty, such as 0.01",
            flush=True,
        )
