"""One training shared by several processes: the process group, its start, signals."""
