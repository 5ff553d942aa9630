"""The autoencoder's parts: its configuration, its kinds, sparse operations and losses."""
