"""Weights that are stored as changes of another model: adapters and diffs."""
