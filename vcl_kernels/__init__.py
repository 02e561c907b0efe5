"""Variance Constancy Loss for PyTorch, fused: loss and gradient in one pass over the activations."""

from importlib.metadata import PackageNotFoundError, version

from . import reference
from .backends import backends
from .functional import sub_batch_moments, vcl_activation, vcl_loss
from .nn.attach import attach
from .nn.batch_norm import remove_batch_norm
from .nn.handle import VCLHandle, handle_of
from .nn.modules import VCL, VCLActivation
from .nn.monitor import VCLMonitor
from .nn.parameters import param_groups, plain_state_dict
from .nn.warn import VCLWarning

try:
    __version__ = version("vcl-kernels")
except PackageNotFoundError:  # used from the source folder
    __version__ = "0+source"

__all__ = [
    "VCL",
    "VCLActivation",
    "VCLHandle",
    "VCLMonitor",
    "VCLWarning",
    "attach",
    "backends",
    "handle_of",
    "param_groups",
    "plain_state_dict",
    "reference",
    "remove_batch_norm",
    "sub_batch_moments",
    "vcl_activation",
    "vcl_loss",
]
