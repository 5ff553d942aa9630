"""Chapters in Markdown -> one JSON list of texts."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from sae_core.data_processing.textbook_process import main

if __name__ == "__main__":
    main()
