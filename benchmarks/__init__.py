"""Measurements that the documents quote; from the root: `python -m benchmarks.speed --help`."""
