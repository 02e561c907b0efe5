"""Variance Constancy Loss for PyTorch, fused: loss and gradient in one pass over the activations."""

from importlib.metadata import PackageNotFoundError, version

from . import reference
from .backends import backends
from .functional import sub_batch_moments, vcl_activation, vcl_loss
from .nn.attach import VCLHandle, attach, param_groups
from .nn.batch_norm import remove_batch_norm
from .nn.modules import VCL, VCLActivation
from .nn.monitor import VCLMonitor

try:
    __version__ = version("vcl-kernels")
except PackageNotFoundError:  # used from the source folder
    __version__ = "0+source"

__all__ = [
    "VCL",
    "VCLActivation",
    "VCLHandle",
    "VCLMonitor",
    "attach",
    "backends",
    "param_groups",
    "reference",
    "remove_batch_norm",
    "sub_batch_moments",
    "vcl_activation",
    "vcl_loss",
]
