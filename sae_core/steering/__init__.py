"""An SAE at work inside its language model: spliced in, steering, reading a text."""
