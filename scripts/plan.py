"""Estimate the cost of every job of a configuration: tokens, FLOPs, disk, memory, hours."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from sae_core.workflow.plan_jobs import main

if __name__ == "__main__":
    main()
