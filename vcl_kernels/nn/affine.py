"""A map of each channel, which a batch norm in evaluation is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["ChannelAffine"]


class ChannelAffine(nn.Module):
    """``y = weight * x + bias`` with a weight and a bias for each channel: a batch norm that was not folded.

    Takes ``(N, C, *spatial)`` with C = ``num_features``. It computes in the wider dtype of input and parameters, and
    returns the input's, as batch norm does. ``device`` and ``dtype`` are those of the parameters, which start as 1 and
    0. Its children, if it has any, follow: those of a batch norm that has its activation inside.

    >>> import torch
    >>> ChannelAffine(3)(torch.ones(2, 3, 4, 4)).shape
    torch.Size([2, 3, 4, 4])
    """

    def __init__(
        self, num_features: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        """Return ``weight * input + bias``; the argument has the name that batch norm gives it."""
        shape = (-1,) + (1,) * (input.ndim - 2)
        y = torch.addcmul(self.bias.view(shape), input, self.weight.view(shape)).to(input.dtype)
        for module in self.children():
            y = module(y)
        return y

    def extra_repr(self) -> str:
        """Return the number of channels."""
        return str(self.num_features)
