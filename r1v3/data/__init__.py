"""Samples, image tiling, packing, task builders and resumable loading."""
