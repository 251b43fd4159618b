"""Drafting tokens with a cheap model and verifying several at once: how many pay, and where they come from."""
