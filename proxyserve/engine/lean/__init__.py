"""The decoder of Llama and its kin with fewer and larger operations, for models on a CPU.

On a CPU a step of a small model, or of a large one for few tokens, is mostly calls: transformers' Llama layer asks
torch for 70 operations, views included, on small tensors. Here it is 35. Products of one input are one product
(queries, keys and values; gate and up), sums with the residual are part of the product before them, a norm is one
operation, and queries and keys are rotated together. The formulas are those of the class, which is the slow twin:
every model is compared with it when it is loaded.
"""
