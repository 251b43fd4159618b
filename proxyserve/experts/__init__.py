"""Experts that come and go while the server runs: where they come from, which generation serves, what survives."""
