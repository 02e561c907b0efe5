"""Elements that kernels read and write, counted in Triton's interpreter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import numpy as np
from torch import Tensor


class Traffic:
    """Addresses of every element that was read or written, once for each access of a program's."""

    def __init__(self) -> None:
        self._seen: list[tuple[str, np.ndarray]] = []

    def add(self, kind: str, addresses: np.ndarray) -> None:
        self._seen.append((kind, np.unique(addresses) if kind == "read" else addresses))  # lanes share what is fetched

    def of(self, kind: str, tensor: Tensor) -> int:
        """Elements of ``tensor``, dense in memory, that were "read" or "write"n; each as often as it was."""
        start = tensor.data_ptr()
        stop = start + tensor.numel() * tensor.element_size()
        return sum(int(((at >= start) & (at < stop)).sum()) for k, at in self._seen if k == kind)

    def total(self, *kinds: str) -> int:
        """All elements, or those of a kind."""
        return sum(at.size for kind, at in self._seen if not kinds or kind in kinds)


@contextlib.contextmanager
def counted() -> Iterator[Traffic]:
    """Count every access within."""
    from triton.runtime.interpreter import InterpreterBuilder

    traffic = Traffic()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counting_load(self, ptrs, mask, *rest):
        traffic.add("read", ptrs.data[mask.data.astype(bool)])
        return load(self, ptrs, mask, *rest)

    def counting_store(self, ptrs, value, mask, *rest):
        traffic.add("write", ptrs.data[mask.data.astype(bool)])
        return store(self, ptrs, value, mask, *rest)

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", counting_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", counting_store),
    ):
        yield traffic
