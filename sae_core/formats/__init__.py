"""SAE directories: ours, and those of SAELens and dictionary_learning."""
