"""Training batches out of a store."""
