"""Texts of any form and size, tokenised once into files that are read memory-mapped."""
