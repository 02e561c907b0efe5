"""Machine code of every launch at the benchmark's shapes, compiled ahead of time without a GPU."""
