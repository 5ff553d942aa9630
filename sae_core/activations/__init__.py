"""From texts to batches of activations: windows of tokens, the language model, the store."""
