"""Alike models in one forward."""
