"""Comparing: one task, every method on the same rows, and which to use."""
