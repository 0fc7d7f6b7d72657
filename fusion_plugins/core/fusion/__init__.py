"""Several source distributions over one text -> one fused distribution per position, and the losses on it."""
