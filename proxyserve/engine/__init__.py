"""The engine: steps that run every lane of every request forward, fuse, sample and report."""
