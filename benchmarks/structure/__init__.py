"""Machine code of every launch at the benchmark's shapes, compiled ahead of time without a GPU.

``python -m benchmarks.structure`` prints registers, spills, access widths and predicted occupancy as a table.
"""
