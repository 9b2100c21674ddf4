"""Evaluation: method x task x seed, to records."""
