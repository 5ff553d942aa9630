"""What Snakemake asks of the package: configuration, checks, planning, console lines."""
