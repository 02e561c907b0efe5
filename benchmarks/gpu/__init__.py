"""``make gpu-check``: build, tests and benchmarks on a machine with CUDA, within a time budget."""
