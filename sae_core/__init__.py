"""Train, evaluate and publish sparse autoencoders on the activations of language models.

Nothing here imports torch, so that the workflow and the command lines can check their settings
before they pay for it. The rooms, from the outermost in:

    model_training/                          the command lines
    sae_train, evaluation/, reporting/, publishing/
    training, checkpoint, activations/       the loop, its checkpoints, where its data comes from
    sae_base, kinds/, losses, sparse_ops     the SAE and its arithmetic
    train_config, sae_config, naming         settings, run names and paths
    cli, console, devices, files, ...        small things that the rooms share

The workflow asks three more: model_sources (fetch), workflow_config (what is to be made) and
code_hash (what code a job depends on).
"""
