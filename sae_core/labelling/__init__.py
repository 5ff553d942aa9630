"""What features mean, said by a language model, and how well each label tells their texts apart."""
