"""The Triton backend: kernels for GPUs, which also run on CPU tensors under ``TRITON_INTERPRET=1``.

``available`` says whether it can run; ``ops`` imports Triton and launches the kernels.
"""
