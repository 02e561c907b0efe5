"""Variance Constancy Loss for PyTorch, fused: loss and gradient in one pass over the activations."""

from . import reference
from .backends import backends
from .functional import sub_batch_moments, vcl_loss

__version__ = "0.1.0"
