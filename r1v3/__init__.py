"""r1v3: the Skywork-R1V3 post-training recipe, on kernels that can be used alone."""

__version__ = "0.1.0"
