"""Which lane computes which tokens in the next step. Knows requests and blocks, no tensors and no models."""
