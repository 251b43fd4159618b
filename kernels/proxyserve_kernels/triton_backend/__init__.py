"""Triton kernels for CUDA devices: the fused rows are formed in registers and read once, block by block.

Importing this package needs triton. With TRITON_INTERPRET=1 in the environment before triton is imported, the same
kernels run on CPU tensors, slowly; that is how they are tested without a GPU.
"""
