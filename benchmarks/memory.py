"""How many bytes a forward pass keeps for backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], object], known: Iterable[Tensor] = ()) -> int:
    """Bytes that ``forward`` keeps for backward: each storage once, those of ``known`` tensors not counted."""
    apart = {tensor.untyped_storage().data_ptr() for tensor in known}
    found: dict[int, torch.UntypedStorage] = {}  # holds the storages, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in apart:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in found.values())
