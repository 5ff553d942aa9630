"""Language models: where they lie, what they are built like, their hooks, a forward pass."""
