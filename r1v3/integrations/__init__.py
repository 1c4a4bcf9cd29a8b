"""Adapters to other training and inference stacks, which are imported only when one is used.

A `use_*()` puts r1v3's kernels where a stack looks up its own. It checks what it replaces first,
and what it returns can take everything back.
"""
