"""Triton kernels: what CUDA tensors of up to 32 bits run."""
