"""Settings that a training shares with other commands, or that are not of a training."""
