"""Benchmarks: proxyserve beside the plain Hugging Face loop, in one run on one machine."""
