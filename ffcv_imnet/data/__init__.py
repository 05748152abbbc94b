"""The .beton file and the batches that come from it."""
