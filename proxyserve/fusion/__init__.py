"""Fusion: what a request asks for, and what it compiles to."""
