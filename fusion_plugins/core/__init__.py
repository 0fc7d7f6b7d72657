"""The algorithms: pure functions on arrays and tensors, which know no host, no file format and no network."""
