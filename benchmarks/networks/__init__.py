"""Training steps of whole networks: without normalisation, with batch norm, with VCL attached."""

from .training import contests

__all__ = ["contests"]
