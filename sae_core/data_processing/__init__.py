"""From chapters to texts: the file of texts, and the program that creates it."""
