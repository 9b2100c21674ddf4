"""Decoder: a frozen model of any family: load it, know it, run it, read it."""
