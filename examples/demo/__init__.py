"""Handwritten digits learnt with no normalisation, batch norm and VCL, side by side: ``python -m examples.demo``."""
