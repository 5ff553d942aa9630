"""Chapters in Markdown -> one JSON list of texts."""

from sae_core.data_processing.textbook_process import main

if __name__ == "__main__":
    main()
