"""SAEs for others: the formats that other tools read."""
