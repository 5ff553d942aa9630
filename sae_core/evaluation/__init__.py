"""How good an SAE is: on its own activations, and inside the language model."""
