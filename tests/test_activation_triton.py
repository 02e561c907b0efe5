"""The Triton ops of activation and loss, forward and backward, against PyTorch in float64."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from common import LAYOUTS, assert_within_budget, written_out
from conftest import GPU
from torch import Tensor

from vcl_kernels import reference
from vcl_kernels.backends.interface import Coefficients, Saved
from vcl_kernels.backends.triton import ops
from vcl_kernels.geometry import empty_rows, in_layout
from vcl_kernels.options import ACTIVATIONS, FORMS, NO_MINIMUM, Activation, LossSpec, SubBatches

DEVICE = "cuda" if GPU else "cpu"
PARAMETERS = {"elu": 1.3, "leaky_relu": 0.2}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
UPSTREAMS = ((True, 30.0), (True, None), (False, 30.0))  # whether of y, and which of the loss
N, n = 11, 3  # two rows take no part at all


def act(name: str) -> Activation:
    return Activation(ACTIVATIONS.index(name), PARAMETERS.get(name, 0.0))


def spec(form: str, x: Tensor, per_activation: bool = False, reduce: bool = True, beta: float = 0.5) -> LossSpec:
    units = x[0].numel() if per_activation else x.shape[1]
    K = 2 if form == "ratio" else x.shape[0] // n
    return LossSpec(beta, NO_MINIMUM, n, K, FORMS.index(form), per_activation, 1 / units, reduce)


def forward(x: Tensor, given: LossSpec, chosen: Activation, keep_rows: bool, beta: Tensor | None = None):
    return ops.activation(x, beta, given, chosen, beta is not None, keep_rows)


def backward(x, y, rows, of_loss, dy, g, given: LossSpec, chosen: Activation, from_output: bool) -> Tensor:
    """Gradient from what autograd would save: y and rows; else x, with the rows if they are kept all the same."""
    saved = None if chosen.name == "identity" and rows.numel() and g is not None else y if from_output else x
    of_x = Saved(saved, rows if rows.numel() else None, from_output)
    return ops.activation_dx(of_x, dy, of_loss, g, chosen, given.sub_batches, x.shape[0])


def oracle(x: Tensor, dy: Tensor | None, g: float | None, given: LossSpec, chosen: Activation, dtype: torch.dtype):
    """y, loss and dx on the CPU in ``dtype``."""
    x = x.detach().cpu().to(dtype).requires_grad_()
    y, loss = reference.activate(x, chosen), reference.loss(x, None, given)
    of = [(y, None if dy is None else dy.cpu().to(dtype)), (loss, None if g is None else torch.tensor(g).to(loss))]
    of = [(output, upstream) for output, upstream in of if upstream is not None]
    (dx,) = torch.autograd.grad([output for output, _ in of], [x], [upstream for _, upstream in of])
    return y.detach(), loss.detach(), dx


def eager(x: Tensor, dy: Tensor | None, g: float | None, given: LossSpec, chosen: Activation):
    """The same in x's own dtype, with either arithmetic of torch.var (see common.eager)."""
    results = [oracle(x, dy, g, given, chosen, x.dtype)]
    with mock.patch.object(reference, "moments", written_out):
        results.append(oracle(x, dy, g, given, chosen, x.dtype))
    return zip(*results, strict=True)


def sample(kind: str, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """x in a layout, and whether its units are activations."""
    x = 2 * torch.randn((N, 37) if kind == "2-D" else (N, 5, 5, 7)) + 0.3
    if kind == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    return x.to(DEVICE, dtype), kind == "per_activation"


def assert_all_within_budget(
    x: Tensor, given: LossSpec, chosen: Activation, keep_rows: bool, from_output: bool, upstreams=UPSTREAMS
) -> None:
    y, loss, of_loss, _, rows = forward(x, given, chosen, keep_rows)
    assert y.stride() == empty_rows(x, x.shape[0]).stride()
    assert not keep_rows or torch.equal(rows, x[: given.K * n])
    for with_dy, g in upstreams:
        dy = torch.randn(x.shape).to(x) if with_dy else None
        upstream = None if g is None else torch.tensor(g).to(loss)
        dx = backward(x, y, rows, of_loss, dy, upstream, given, chosen, from_output)
        exact = oracle(x, dy, g, given, chosen, torch.float64)
        same_precision = eager(x, dy, g, given, chosen)
        for actual, others, wanted in zip((y, loss, dx), same_precision, exact, strict=True):
            assert_within_budget(actual, list(others), wanted)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["contiguous", "channels_last", "2-D", "per_activation"])
@pytest.mark.parametrize("form", ["ratio", "relative_variance"])
def test_within_the_error_of_eager(name, dtype, kind, form):
    """A pair, with its rows kept; and all sub-batches, with x saved."""
    x, per_activation = sample(kind, dtype)
    pair = form == "ratio"
    assert_all_within_budget(x, spec(form, x, per_activation), act(name), pair, pair and act(name).from_output)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per_activation", [False, True])
@pytest.mark.parametrize("shape", [(N, 5, 5, 7), (N, 1, 5, 7), (N, 5, 1, 1), (N, 6, 9), (N, 3, 2, 3, 4)], ids=str)
def test_views(layout, per_activation, shape):
    x = in_layout(LAYOUTS[layout](torch.randn(shape, device=DEVICE, dtype=torch.float64)), per_activation)
    both = UPSTREAMS[:1]
    assert_all_within_budget(x, spec("ratio", x, per_activation), act("elu"), True, True, both)
    assert_all_within_budget(x, spec("variance", x, per_activation), act("silu"), False, False, both)


@pytest.mark.parametrize("shape", [(N, 3, 70, 70), (N, 70, 9, 9), (N, 300), (8, 2, 3), (9, 2, 40, 120)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_several_tiles(shape, channels_last):
    x = torch.randn(shape, device=DEVICE)
    if channels_last and len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    assert_all_within_budget(x, spec("ratio", x), act("elu"), True, True)


def assert_like_eager(actual: Tensor, wanted: Tensor, x: Tensor) -> None:
    """NaN where eager PyTorch has it, unless by an overflow of its own (gelu_tanh at 1e30) or only in vector code."""
    same = torch.isclose(actual.cpu(), wanted, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert (same | wanted.isnan() & ~x.isnan().cpu()).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("from_output", [False, True])
def test_nan_and_inf_as_in_pytorch(name, from_output):
    chosen = act(name)
    if from_output and not chosen.from_output:
        pytest.skip("its derivative needs x")
    x, _ = sample("contiguous", torch.float32)
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 100.0, -100.0, 0.0, 1e-40])
    x[1, :, 0, 0] = torch.nan
    x.view(N, -1)[-1, : len(odd)] = odd
    x.view(N, -1)[2, : len(odd)] = odd
    given, dy = spec("ratio", x), torch.randn_like(x)
    y, loss, of_loss, _, rows = forward(x, given, chosen, True)
    dx = backward(x, y, rows, of_loss, dy, None, given, chosen, from_output)
    exact = oracle(x, dy, None, given, chosen, torch.float32)
    assert_like_eager(y, exact[0], x)
    assert_like_eager(dx, exact[2], x)
    assert y.isnan()[x.isnan()].all()
    assert loss.isnan()
    dx = backward(x, y, rows, of_loss, dy, torch.ones_like(loss), given, chosen, from_output)
    assert dx[: given.K * n].isnan().all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_in_the_upstream_gradient(name):
    x, _ = sample("contiguous", torch.float32)
    given, chosen = spec("ratio", x), act(name)
    dy = torch.ones_like(x)
    dy[:, 2] = torch.nan
    dy[:, 3] = torch.inf
    y, _, of_loss, _, rows = forward(x, given, chosen, True)
    dx = backward(x, y, rows, of_loss, dy, None, given, chosen, chosen.from_output)
    wanted = oracle(x, dy, None, given, chosen, torch.float32)[2]
    assert_like_eager(dx, wanted, x)
    assert dx[:, 2][x[:, 2] > 0].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["elu", "tanh"])
def test_digits_are_kept_near_zero(name, dtype):
    about = torch.finfo(dtype)
    size = torch.logspace(max(-30, math.log10(about.tiny)), 2, 3000, dtype=torch.float64)
    x = torch.cat([size, -size]).view(2 * n, -1).to(DEVICE, dtype)
    exact = reference.activate(x.double(), act(name))
    y = forward(x, spec("ratio", x), act(name), False)[0]
    roundings = 1.01 if about.bits == 16 else 4  # in half precision little but the last, which the interpreter cuts off
    assert ((y.double() - exact) / exact).abs().max() < roundings * about.eps


@pytest.mark.parametrize("name", ["elu", "gelu", "relu"])
@pytest.mark.parametrize("form", ["ratio", "relative_variance"])
def test_bitwise_repeatable(name, form):
    x, _ = sample("contiguous", torch.bfloat16)
    given, chosen = spec(form, x), act(name)
    dy, g = torch.randn_like(x), torch.tensor(2.0, device=DEVICE)
    results = []
    for _ in range(2):
        y, loss, of_loss, dbeta, rows = forward(x, given, chosen, True, torch.tensor(0.5, device=DEVICE))
        dx = backward(x, y, rows, of_loss, dy, g, given, chosen, chosen.from_output)
        results.append((y, loss, *of_loss[:2], dbeta, rows, dx))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["relu", "gelu"])
@pytest.mark.parametrize("beta_shape", [(), (5,)], ids=str)
@pytest.mark.parametrize("reduce", [False, True])
def test_same_loss_as_without_an_activation(name, beta_shape, reduce):
    x, _ = sample("contiguous", torch.float32)
    given, beta = spec("ratio", x, reduce=reduce), torch.full(beta_shape, 0.7, device=DEVICE)
    expected = ops.loss_coefficients(x, beta, given, True, False)
    _, *actual = forward(x, given, act(name), False, beta)
    assert actual[-1].numel() == 0
    torch.testing.assert_close(tuple(actual), expected, rtol=0, atol=0)


def test_loss_part_alone_is_that_of_the_moments():
    x, _ = sample("contiguous", torch.float32)
    given, chosen, g = spec("ratio", x), act("elu"), torch.tensor(2.0, device=DEVICE)
    y, _, of_loss, _, rows = forward(x, given, chosen, True)
    dx = backward(x, y, rows, of_loss, None, g, given, chosen, True)
    scaled = Coefficients(of_loss.mean, of_loss.scale * g, torch.zeros_like(of_loss.mean))
    assert torch.equal(dx, ops.moments_dx(rows, of_loss, g, given.sub_batches, N))
    assert torch.equal(dx, ops.moments_dx(rows, scaled, None, given.sub_batches, N))
    assert not dx[2 * n :].any()


def test_upstream_multiplies_the_shift_too():
    x, _ = sample("channels_last", torch.float32)
    given, cut = Coefficients(*torch.randn(3, 2, 5, device=DEVICE)), SubBatches(n, 2, False)
    dx = ops.moments_dx(x, given, torch.tensor(2.0, device=DEVICE), cut, N)
    assert torch.equal(dx, 2 * ops.moments_dx(x, given, None, cut, N))
