"""Measurements of the kernels: `python -m proxyserve_kernels.bench`.

On a CPU: the torch backend beside what one would write with torch.sort. On a GPU: ceilings of the machine, correctness,
every kernel beside its prediction, and the baselines, within eight minutes.
"""
