"""A model of one multiprocessor: how near to a copy the kernels over logits can come.

`python -m benchmarks.multiprocessor` compiles the kernels, reads their machine code and prints the
expected share of a copy's rate on H100, H200 and B200. No GPU is needed, and nothing is measured.
"""
