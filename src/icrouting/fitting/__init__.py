"""Fitting: the paper's three stages."""
