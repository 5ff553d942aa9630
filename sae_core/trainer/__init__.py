"""What surrounds a training step: batches, the optimizer, schedules, saved states, observers."""
