"""From texts to batches of activations: windows of tokens, shards on disk, the clean pass."""
