"""Values and first derivatives of vcl_loss, and of all functions in every shape, layout and far from zero."""

import pytest
import torch
from common import DTYPES, LAYOUTS, LEARNED, check, results, set_limit
from conftest import device_of

import vcl_kernels as vk
from vcl_kernels.backends.triton import finalise
from vcl_kernels.options import FORMS, UNITS

SHAPES = {  # each takes another path: one pass, gradient in backward, one pair of many rows, masked tails
    "2d": (33, 37),
    "2d_pair_of_many": (64, 16),
    "ncl": (12, 5, 18),
    "nchw": (17, 6, 7, 7),
    "ncdhw": (10, 3, 2, 3, 5),
    "long": (10, 3, 48, 40),
}


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_shapes(backend, shape, form, unit):
    x = 2 * torch.randn(shape).to(device_of(backend)) + 0.5
    check(vk.vcl_loss, x, backend, form=form, unit=unit, sub_batch_size=4)
    if unit == "channel" and form != "variance":
        check(vk.vcl_activation, x, backend, activation="relu", form=form, sub_batch_size=4)


IN_MEMORY = [
    *((layout, torch.float32) for layout in LAYOUTS),
    *((layout, dtype) for layout in ("contiguous", "channels_last", "samples_inside") for dtype in DTYPES[1:]),
]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(("layout", "dtype"), IN_MEMORY, ids=str)
def test_layouts_and_dtypes(kernel_backend, layout, dtype, unit):
    """Rows past the last sub-batch have a gradient of 0, also where samples do not lie one after another."""
    C = 18 if kernel_backend == "cpu" else 5  # a vector and more; the interpreter is slow
    x = LAYOUTS[layout](torch.randn(14, C, 6, 5).to(device_of(kernel_backend), dtype))
    pair = {"unit": unit, "sub_batch_size": 3}
    every = {"unit": unit, "sub_batch_size": 4, "form": "relative_variance"}
    for options, activation in ((pair, "elu"), (every, "silu")):  # saved is y with the rows of the pair; or x
        check(vk.vcl_loss, x, kernel_backend, **options)
        check(vk.vcl_activation, x, kernel_backend, activation=activation, **options)
    check(vk.sub_batch_moments, x, kernel_backend, unit=unit, sub_batch_size=5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(11, 1, 5, 7), (11, 5, 1, 1), (11, 6, 9), (11, 3, 2, 3, 4)], ids=str)
def test_layouts_of_other_shapes(backend, shape, layout):
    """The stride of a dimension of size 1 means nothing."""
    x = LAYOUTS[layout](torch.randn(shape, dtype=torch.float64).to(device_of(backend)))
    for activation, unit, form in (("elu", "channel", "ratio"), ("silu", "activation", "variance")):
        check(vk.vcl_activation, x, backend, activation=activation, unit=unit, form=form, sub_batch_size=3)


def test_gradients_of_slices_have_no_gaps(backend):
    x = torch.randn(14, 6, 5, 4).to(device_of(backend))
    for function, options in (
        (vk.vcl_loss, {}),
        (vk.vcl_activation, {}),
        (vk.sub_batch_moments, {"sub_batch_size": 5}),
    ):
        for layout, strides in (("channel_slice", (120, 20, 4, 1)), ("channels_last_slice", (120, 1, 24, 6))):
            assert check(function, LAYOUTS[layout](x), backend, beta=None, **options)[-1].stride() == strides


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize(("shape", "n"), [((600, 70), 5), ((600, 1030), 8), ((530, 40), 260), ((600, 70), 2)])
def test_cpu_takes_many_rows_in_memory_order(shape, n, dtype):
    """Sub-batches of one part and of several, blocks of units that are one task; n = 2 has moments as large as x."""
    x = (torch.randn(shape) + 0.5).to(dtype)
    for form in FORMS:
        check(vk.vcl_loss, x, "cpu", form=form, sub_batch_size=n, num_sub_batches=shape[0] // n // 2 * 2)


UNLIKE_THEIR_FIRST_VALUES = {  # kernels take a first value as the pivot of sums: an outlier would cost digits
    "alike": lambda x: x,
    "border": lambda x: x.index_fill(2, torch.tensor(0, device=x.device), 10),
    "first vector": lambda x: x.flatten(2).index_fill(2, torch.arange(16, device=x.device), 100).view_as(x),
    "first sample": lambda x: torch.cat([x[:1] + 30, x[1:]]),
}


@pytest.mark.parametrize("P", [7, 14])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("change", UNLIKE_THEIR_FIRST_VALUES)
def test_first_values_unlike_the_others(kernel_backend, change, layout, P):
    rows = 20 if kernel_backend == "cpu" else 10  # the interpreter is slow
    x = torch.randn(rows, 24, P, P).to(device_of(kernel_backend))  # channels enough that eager is not just lucky
    x = LAYOUTS[layout](UNLIKE_THEIR_FIRST_VALUES[change](x))
    for form in ("ratio", "relative_variance"):
        check(vk.vcl_loss, x, kernel_backend, form=form)
    if kernel_backend == "cpu":
        check(vk.sub_batch_moments, x, "cpu", sub_batch_size=5)


@pytest.mark.parametrize("beta", [None, "scalar", "units"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_beta_and_reduction(backend, beta, reduction):
    x = torch.randn(18, 71, 4).to(device_of(backend))
    for form in ("ratio", "relative_variance"):
        for unit in UNITS:
            check(vk.vcl_loss, x, backend, beta=beta, form=form, unit=unit, reduction=reduction)


@pytest.mark.parametrize("K", [2, 3, 4, 5])
def test_number_of_sub_batches(backend, K):
    x = torch.randn(23, 6, 5).to(device_of(backend))
    for form in FORMS:
        dx = check(vk.vcl_loss, x, backend, form=form, sub_batch_size=4, num_sub_batches=K)[1]
        taking_part = 4 * (K // 2 * 2 if form == "ratio" else K)
        assert not dx[taking_part:].any()
        assert dx[:taking_part].any()


@pytest.mark.parametrize("form", ["ratio", "relative_variance"])
def test_expanded_and_other_upstream_gradients(backend, form):
    x = torch.randn(20, 6, 4).to(device_of(backend))
    check(vk.vcl_loss, x, backend, form=form, g=torch.ones(()).expand(6))
    for g in (1.0, 3.5, 0.0):
        check(vk.vcl_loss, x, backend, form=form, g=torch.tensor(g), reduction="mean")
    leaves = x.clone().requires_grad_(), x.clone().requires_grad_()
    vk.vcl_loss(leaves[0], form=form, reduction="none", backend=backend).sum().backward()  # expands its own gradient
    vk.vcl_loss(leaves[1], form=form, reduction="sum", backend=backend).backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize("options", [{}, {"form": "relative_variance", "sub_batch_size": 4}])
def test_backward_twice(kernel_backend, options, weight):
    """A gradient that was handed out belongs to whoever has it: backward reads it no more."""
    x = torch.randn(32, 5, 3).to(device_of(kernel_backend)).requires_grad_()
    loss = weight * vk.vcl_loss(x, backend=kernel_backend, **options)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    expected = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(second, expected)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_mean_far_from_zero(kernel_backend, layout):
    for shape, units in (((16, 6, 8, 8), UNITS), ((10, 3, 33, 20), UNITS[:1])):
        x = LAYOUTS[layout](torch.randn(shape).to(device_of(kernel_backend)) + 1e4)
        for form in FORMS:
            for unit in units:
                check(vk.vcl_loss, x, kernel_backend, beta=None, form=form, unit=unit)
            check(vk.vcl_activation, x, kernel_backend, beta=None, form=form, activation="relu")


def test_zero_variance(backend):
    x = torch.full((12, 3, 4), 2.5, device=device_of(backend))
    for form, wanted in (("ratio", 1.0), ("relative_variance", 0.0)):  # (1 - 0 / (0 + 1))²; 0 / beta²
        loss, dx = results(vk.vcl_loss, x, form=form, backend=backend)
        assert loss == wanted
        assert not dx.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_unit(backend, bad):
    x = torch.randn(20, 4, 9).to(device_of(backend))
    x[11, 1, 2] = bad  # takes no part
    assert all(t.isfinite().all() for t in results(vk.vcl_loss, x, backend=backend))
    x[3, 1, 2] = bad
    loss, dx = results(vk.vcl_loss, x, [torch.ones(4)], reduction="none", backend=backend)
    assert loss.isnan().tolist() == [False, True, False, False]
    assert dx[:10, 1].isnan().all()
    assert dx[:, [0, 2, 3]].isfinite().all()


def test_no_channels(backend):
    x = torch.randn(12, 0, 4).to(device_of(backend)).requires_grad_()
    assert vk.vcl_loss(x, reduction="sum", backend=backend) == 0
    assert vk.vcl_loss(x, reduction="mean", backend=backend).isnan()
    assert vk.vcl_loss(x, reduction="none", backend=backend).shape == (0,)


def test_half_gradient_does_not_vanish_under_a_loss_scale(kernel_backend):
    """With a weight of 1e-4 it is below float16's least value; times 65536 it is not, if scaled before rounding."""
    x = torch.randn(32, 7, 8, 8).to(device_of(kernel_backend)).half()
    options = {"form": "relative_variance", "sub_batch_size": 8}
    scale = [torch.tensor(6.5536)]
    _, dx = results(vk.vcl_loss, x, scale, backend=kernel_backend, **options)
    _, exact = results(vk.reference.vcl_loss, x.double(), scale, **options)
    assert exact.abs().max() / 65536 < 6e-8
    assert ((dx.double() - exact).abs() <= 1e-3 * exact.abs() + 6e-8).all()


@pytest.mark.parametrize("units", [(), 3])
def test_a_nan_in_beta_is_not_hidden(backend, units):
    vcl = vk.VCL(units, beta_init=float("nan"), beta_min=1e-3, backend=backend, **LEARNED).to(device_of(backend))
    vcl(torch.randn(10, 3, 4).to(device_of(backend)))
    vcl.loss.backward()
    assert vcl.beta.grad.isnan().all()


@pytest.mark.parametrize("per_unit", [False, True])
@pytest.mark.parametrize("units", [40, 1500])
@pytest.mark.parametrize(("rows", "form"), [(10, "ratio"), (24, "ratio"), (10, "relative_variance")])
def test_beta_below_its_minimum_may_only_rise(monkeypatch, backend, rows, form, units, per_unit):
    """The minimum acts in its place, and a gradient that would lower it further is 0; of one beta, as a whole."""
    set_limit(monkeypatch, finalise, "READ_BY_ONE", 1024)  # one program sums over 40 units, but not over 1500
    x = torch.randn(rows, units).to(device_of(backend))

    def loss_and_dbeta(beta):
        options = {"form": form, "beta_init": beta, "beta_min": 1e-3, "weight": 0.5, "backend": backend}
        vcl = vk.VCL(units if per_unit else (), **LEARNED, **options).to(x.device)
        vcl(x)
        return vcl.loss, *torch.autograd.grad(vcl.loss, vcl.beta)

    (loss, dbeta), (wanted, free) = loss_and_dbeta(1e-4), loss_and_dbeta(1e-3)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(dbeta, free.clamp(max=0))
    if per_unit and form == "ratio":
        assert (free > 0).any()
        assert (free < 0).any()


def test_moments_are_those_of_torch(backend):
    x = torch.randn(20, 6, 9, dtype=torch.float64).to(device_of(backend))
    mean, var = vk.sub_batch_moments(x, 5, backend=backend)
    torch.testing.assert_close(mean[1], x[5:10].mean((0, 2)))
    torch.testing.assert_close(var[3], x[15:].transpose(0, 1).flatten(1).var(1))
    mean, var = vk.sub_batch_moments(x, 5, unit="activation", num_sub_batches=2, backend=backend)
    assert mean.shape == var.shape == (2, 6, 9)
    torch.testing.assert_close(var[1], x[5:10].var(0))
