"""The data sets, one file each, and the batches and the cache that they share."""
