"""What every op reads and writes, counted in the interpreter, against the least that its job needs.

Tensors of the size of x must be read and written exactly as often as the floor says; the few values of a unit
(coefficients, partial moments) are counted together: little beside x where a unit has many positions.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from common import set_limit
from conftest import GPU
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

import vcl_kernels as vk
from vcl_kernels.backends.interface import Coefficients, Saved
from vcl_kernels.backends.triton import finalise, moments, ops
from vcl_kernels.geometry import Geometry
from vcl_kernels.options import ACTIVATIONS, FORMS, NO_MINIMUM, Activation, LossSpec, SubBatches

pytestmark = pytest.mark.skipif(GPU, reason="counts come from the interpreter; a GPU runs the kernels themselves")

n = 5
PAIR_OR_ALL = ("ratio", "relative_variance")


class Traffic:
    """The addresses of all elements that programs read or write, one entry an access."""

    def __init__(self) -> None:
        self._seen: list[tuple[str, np.ndarray]] = []

    def add(self, kind: str, addresses: np.ndarray) -> None:
        self._seen.append((kind, np.unique(addresses) if kind == "read" else addresses))  # lanes share what is fetched

    def of(self, kind: str, tensor: Tensor) -> int:
        """Count accesses to elements of ``tensor``, which is dense in memory; ``kind`` is "read" or "write"."""
        start = tensor.data_ptr()
        stop = start + tensor.numel() * tensor.element_size()
        return sum(int(((at >= start) & (at < stop)).sum()) for k, at in self._seen if k == kind)

    def total(self, *kinds: str) -> int:
        """Count all accesses, or those of some kinds."""
        return sum(at.size for kind, at in self._seen if not kinds or kind in kinds)


@contextlib.contextmanager
def counted() -> Iterator[Traffic]:
    """Count the accesses of every kernel that runs inside."""
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


def activation(name: str) -> Activation:
    return Activation(ACTIVATIONS.index(name), 1.0)


class Kind(NamedTuple):
    """A tensor, whether its sub-batches are split over programs, and the share of all else in traffic, at most."""

    shape: tuple[int, ...]
    split: bool
    others: float
    channels_last: bool = False
    per_activation: bool = False

    def tensor(self) -> Tensor:
        x = torch.randn(self.shape)
        return x.to(memory_format=torch.channels_last) if self.channels_last else x


# A unit of n values has a mean, a scale, and Σ (x - mean)² written and read: nearly as many as it has values.
KINDS = {
    "spatial": Kind((20, 2, 40, 40), True, 0.006),
    "spatial, small P": Kind((20, 16, 7, 7), False, 0.04),
    "unit": Kind((20, 16, 24, 24), True, 0.12, channels_last=True),
    "unit, small P": Kind((20, 40, 2, 3), False, 0.2, channels_last=True),
    "2-D": Kind((20, 300), False, 1.1),
    "per activation": Kind((20, 6, 5, 7), False, 1.1, per_activation=True),
}


# Every activation where a tile is small, and one of them everywhere
ACTIVATED = [*((kind, "elu") for kind in KINDS), *(("2-D", name) for name in ACTIVATIONS if name != "elu")]
SAVED = [(*one, "x") for one in ACTIVATED]
SAVED += [(*one, saved) for one in ACTIVATED for saved in ("y", "y and rows") if activation(one[1]).from_output]


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture
def traffic():
    with counted() as traffic:
        yield traffic


def spec(kind: Kind, form: str) -> LossSpec:
    K = 2 if form == "ratio" else kind.shape[0] // n
    return LossSpec(0.5, NO_MINIMUM, n, K, FORMS.index(form), kind.per_activation, 1.0, True)


def coefficients(kind: Kind, x: Tensor, K: int, with_shift: bool = False) -> Coefficients:
    shape = (K, *(x.shape[1:] if kind.per_activation else x.shape[1:2]))
    return Coefficients(torch.randn(shape), torch.randn(shape), torch.randn(shape) if with_shift else None)


def assert_at_floor(traffic, kind: Kind, reads: dict[Tensor, int], writes: dict[Tensor, int]) -> None:
    """Each tensor as many elements as said, and little else."""
    for way, floors in (("read", reads), ("write", writes)):
        for tensor, floor in floors.items():
            assert traffic.of(way, tensor) == floor, (way, tuple(tensor.shape))
    floor = sum(reads.values()) + sum(writes.values())
    assert traffic.total() <= (1 + kind.others) * floor


def test_kinds_are_split_or_not(kind):
    x = kind.tensor()
    launch = moments.plan(Geometry.of(x, SubBatches(n, 2, kind.per_activation)), x.element_size(), activates=False)
    assert (launch.sizes["parts"] > 1) == kind.split


@pytest.mark.parametrize("form", PAIR_OR_ALL)
def test_loss_reads_its_rows_once(traffic, kind, form):
    x, given = kind.tensor(), spec(kind, form)
    ops.loss(x, None, given)
    assert_at_floor(traffic, kind, {x: given.K * n * x[0].numel()}, {x: 0})


@pytest.mark.parametrize("form", PAIR_OR_ALL)
def test_loss_and_dx_in_one_pass(traffic, kind, form):
    x, given = kind.tensor(), spec(kind, form)
    if not ops.takes_one_pass(x, given):
        assert kind.split
        return
    _, dx, _ = ops.loss_dx(x, None, given, False)
    assert_at_floor(traffic, kind, {x: given.K * n * x[0].numel()}, {dx: x.numel()})


@pytest.mark.parametrize(("form", "beta_grad"), [("ratio", True), ("relative_variance", False)])
def test_coefficients_of_the_loss_cost_a_read_and_the_rows_that_are_kept(traffic, kind, form, beta_grad):
    x, given = kind.tensor(), spec(kind, form)
    beta = torch.tensor(0.5) if beta_grad else None
    *_, rows = ops.loss_coefficients(x, beta, given, beta_grad, form == "ratio")
    taking_part = given.K * n * x[0].numel()
    assert rows.numel() == (taking_part if form == "ratio" else 0)
    assert_at_floor(traffic, kind, {x: taking_part}, {rows: rows.numel()})


def test_moments_cost_a_read(traffic, kind):
    x, K = kind.tensor(), kind.shape[0] // n
    ops.moments(x, SubBatches(n, K, kind.per_activation))
    assert_at_floor(traffic, kind, {x: x.numel()}, {x: 0})


@pytest.mark.parametrize(
    ("rows", "with_shift", "with_g"), [(20, False, True), (20, True, False), (10, True, True), (10, False, False)]
)
def test_dx_of_moments_reads_the_rows_that_take_part(traffic, kind, rows, with_shift, with_g):
    x, K = kind.tensor()[:rows], rows // n
    g, cut = torch.tensor(2.0) if with_g else None, SubBatches(n, K, kind.per_activation)
    dx = ops.moments_dx(x, coefficients(kind, x, K, with_shift), g, cut, 20)
    assert_at_floor(traffic, kind, {x: x.numel()}, {dx: dx.numel()})


@pytest.mark.parametrize(("kind", "name"), ACTIVATED, indirect=["kind"])
@pytest.mark.parametrize("keep_rows", [False, True])
def test_activation_reads_x_and_writes_y(traffic, kind, name, keep_rows):
    x, given, chosen = kind.tensor(), spec(kind, "ratio"), activation(name)
    y, *_, rows = ops.activation(x, None, given, chosen, False, keep_rows)
    assert rows.numel() == keep_rows * given.K * n * x[0].numel()
    writes = {y: x.numel(), **({rows: rows.numel()} if keep_rows else {})}
    assert_at_floor(traffic, kind, {x: x.numel()}, writes)


@pytest.mark.parametrize(("kind", "name", "saved"), SAVED, indirect=["kind"])
@pytest.mark.parametrize("upstream", ["both", "dy", "g"])
def test_activation_gradient_reads_what_it_needs(traffic, kind, name, saved, upstream):
    x, K, chosen = kind.tensor(), 2, activation(name)
    taking_part = x[: K * n].clone(memory_format=torch.preserve_format)
    rows = taking_part if saved == "y and rows" else None
    dy = torch.randn_like(x) if upstream != "g" else None
    g = torch.tensor(2.0) if upstream != "dy" else None
    cut = SubBatches(n, K, kind.per_activation)
    of_loss = coefficients(kind, x, K)
    dx = ops.activation_dx(Saved(x, rows, saved != "x"), dy, of_loss, g, chosen, cut, x.shape[0])
    E, few = x.numel(), taking_part.numel()
    for_derivative = dy is not None and name != "identity"
    for_loss = g is not None and rows is None
    reads = {x: E if for_derivative else few if for_loss else 0}
    if dy is not None:
        reads[dy] = E
    if rows is not None:
        reads[rows] = few if g is not None else 0
    assert_at_floor(traffic, kind, reads, {dx: E})


@pytest.mark.parametrize("elements", [1, 5000, 70000])
def test_upstream_of_one_leaves_dx_alone(traffic, elements):
    dx = torch.randn(elements)
    kept = dx.clone()
    ops.multiply_(dx, torch.tensor(1.0))
    assert traffic.of("read", dx) == traffic.of("write", dx) == 0
    ops.multiply_(dx, torch.tensor(0.5))
    assert torch.equal(dx, kept / 2)
    assert traffic.of("read", dx) == traffic.of("write", dx) == elements


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(22, 6, 7, 7), (21, 70, 1, 1)])
def test_an_upstream_gradient_of_one_costs_nothing(traffic, shape, channels_last):
    x = torch.randn(shape)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    loss = vk.vcl_loss(x.requires_grad_(), form="relative_variance", sub_batch_size=n, backend="triton")
    (dx,) = torch.autograd.grad(loss, x)
    taking_part = x[: shape[0] // n * n].numel()
    assert traffic.of("read", x) == taking_part
    assert traffic.of("write", dx) == x.numel()
    assert traffic.total() <= taking_part + x.numel() + 4 * math.prod(shape[1:])


def test_pair_reads_its_rows_only(traffic):
    x = torch.randn(64, 6, 20, requires_grad=True)
    loss = vk.vcl_loss(x, backend="triton")
    (dx,) = torch.autograd.grad(loss, x)
    assert traffic.total("read") < 3 * 10 * 6 * 20
    assert traffic.of("write", dx) == x.numel()


@pytest.mark.parametrize("U", [3, 16, 17])
@pytest.mark.parametrize("scalar", [False, True])
def test_sum_over_units_needs_no_launch_of_its_own(monkeypatch, U, scalar):
    set_limit(monkeypatch, finalise, "READ_BY_ONE", 32)  # of two sub-batches
    x = torch.randn(10, U, dtype=torch.float64)
    beta = torch.rand(() if scalar else U, dtype=torch.float64)
    results = []
    for reduce in (False, True):
        given = LossSpec(0.0, NO_MINIMUM, 5, 2, 0, False, 1.0, reduce)
        with counted() as traffic:
            results.append(ops.loss_coefficients(x, beta, given, True, False))
    each, reduced = results
    assert reduced[0].shape == ()
    assert torch.allclose(reduced[0], each[0].sum(), rtol=1e-12)
    assert torch.allclose(reduced[2], each[2].sum() if scalar else each[2], rtol=1e-12)
    assert traffic.of("write", reduced[0]) == (U <= 16)  # else PyTorch adds the units
