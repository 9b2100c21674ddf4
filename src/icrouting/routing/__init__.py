"""Routing: the paper's mechanism on a model."""
