"""The peers' contenders in the benchmark of quality: sae-lens's and dictionary-learning's."""

from itertools import cycle
from typing import Any

import torch
from machine import DEVICE
from sae_figures import Data, Trained


def sae_lens(data: Data, features: int, k: int, lr: float, seed: int) -> Trained:
    """sae-lens's BatchTopK SAE."""
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

    torch.manual_seed(seed)
    d_in = data.held_out.shape[1]
    scale = d_in**0.5  # what its normalisation of activations comes to
    sae = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(d_in=d_in, d_sae=features, k=k, device=DEVICE.type)
    )
    fit_sae_lens(sae, data, scale, lr)
    return Trained(
        lambda x: sae.encode_with_hidden_pre(scale * x)[1],
        lambda code: sae.decode(code) / scale,
        float(sae.topk_threshold),
    )


def fit_sae_lens(sae: Any, data: Data, scale: float, lr: float) -> None:
    """sae-lens's trainer, with our warm-up and decay, on activations times `scale`."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    n_steps, size = len(data.batches), len(data.batches[0])
    trainer_config = SAETrainerConfig(
        total_training_samples=n_steps * size,
        train_batch_size_samples=size,
        lr=lr,
        lr_end=lr / 10,
        lr_warm_up_steps=n_steps // 20,
        lr_decay_steps=n_steps // 5,
        device=DEVICE.type,
    )
    SAETrainer(trainer_config, sae, (scale * x for x in cycle(data.batches))).fit()


def dictionary_learning(data: Data, features: int, k: int, lr: float, seed: int) -> Trained:
    """dictionary-learning's trainer, with our warm-up and decay."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer

    n_steps = len(data.batches)
    trainer = BatchTopKTrainer(
        n_steps,
        data.held_out.shape[1],
        features,
        k,
        0,
        "none",
        lr=lr,
        warmup_steps=n_steps // 20,
        decay_start=n_steps - n_steps // 5,
        threshold_start_step=n_steps // 2,
        threshold_beta=0.9,
        seed=seed,
        device=DEVICE.type,
    )
    for step, x in enumerate(data.batches):
        trainer.update(step, x)
    ae = trainer.ae
    return Trained(lambda x: ae.encoder(x - ae.b_dec), ae.decode, float(ae.threshold))
