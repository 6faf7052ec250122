"""Measurements that people can run: `make bench`."""
