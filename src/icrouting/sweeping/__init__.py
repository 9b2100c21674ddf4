"""Sweeping: fits that differ in a few settings, each a row of one table."""
