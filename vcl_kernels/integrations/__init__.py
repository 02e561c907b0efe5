"""VCL in the training loops of other libraries. Each module imports its library; import the one that you use.

- ``vcl_kernels.integrations.lightning``: :class:`VCLCallback`
- ``vcl_kernels.integrations.transformers``: :class:`VCLTrainer`
- ``vcl_kernels.integrations.accelerate``: :func:`attach`, :func:`follow`
"""

from .schedule import weight_at

__all__ = ["weight_at"]
