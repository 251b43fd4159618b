"""Eager torch: the path of a CPU server, and the readable twin of the Triton kernels. It runs on any device."""
