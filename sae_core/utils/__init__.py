"""Used everywhere, and knows nothing of SAEs: files, errors, names, records, progress, devices."""
