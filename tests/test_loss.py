"""vcl_loss: values and first derivatives against the float64 oracle, on every backend, layout and dtype."""

import pytest
import torch
from common import LAYOUTS, assert_within_budget, eager, gradients, oracle
from conftest import FORMS, UNITS, device_of

import vcl_kernels as vk

SHAPES = {  # each for a path: one pass, deferred, pairs only, tails of vectors and tiles
    "2d": (33, 37),
    "2d_pair_of_many": (64, 16),
    "ncl": (12, 5, 18),
    "nchw": (17, 6, 7, 7),
    "ncdhw": (10, 3, 2, 3, 5),
    "long": (10, 8, 48, 40),
}


def loss_of(x, beta, backend, g=None, **options):
    x = x.detach().requires_grad_()
    inputs = [x]
    if isinstance(beta, torch.Tensor):
        beta = beta.detach().requires_grad_()
        inputs.append(beta)
    loss = vk.vcl_loss(x, beta, backend=backend, **options)
    return [loss.detach(), *gradients(loss, inputs, g)]


def beta_for(x, form, unit, kind):
    if form == "variance" or kind == "default":
        return None
    shape = () if kind == "scalar" else x.shape[1:2] if unit == "channel" else x.shape[1:]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.rand(shape, dtype=wide).to(x.device) + 0.1


def per_unit(x, unit):
    """Upstream gradients for reduction="none": the errors of many units, where one sum's would be a matter of luck."""
    shape = x.shape[1:2] if unit == "channel" else x.shape[1:]
    return {"g": torch.rand(shape, dtype=torch.float32).to(x.device).add(0.5).to(
        torch.float64 if x.dtype == torch.float64 else torch.float32), "reduction": "none"}  # fmt: skip


def check(x, backend, g=None, beta=None, **options):
    actual = loss_of(x, beta, backend, g, **options)
    exact = oracle(x, beta, g, **options)
    for a, e, o in zip(actual, eager(x, beta, g, backend, **options), exact, strict=True):
        assert_within_budget(a, e, o)
    assert actual[1].dtype == x.dtype
    return actual


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_value_and_gradient(backend, shape, form, unit):
    torch.manual_seed(0)
    x = torch.randn(shape).to(device_of(backend)) * 2 + 0.5
    beta = beta_for(x, form, unit, "units")
    units = x.shape[1:2] if unit == "channel" else x.shape[1:]
    g = torch.rand(units).to(x.device) + 0.5
    check(x, backend, g, beta, form=form, unit=unit, sub_batch_size=4, reduction="none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_dtypes(kernel_backend, dtype, form):
    torch.manual_seed(1)
    x = (torch.randn(24, 6, 7, 9).to(device_of(kernel_backend)) + 0.5).to(dtype)
    for unit in UNITS:
        beta = beta_for(x, form, unit, "units")
        options = {"form": form, "unit": unit, "sub_batch_size": 6}
        loss, *_ = check(x, kernel_backend, beta=beta, **options, **per_unit(x, unit))
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("shape", "n"), [((600, 70), 5), ((600, 1030), 8), ((530, 40), 260), ((600, 70), 2)])
def test_cpu_takes_many_rows_in_memory_order(shape, n, dtype):
    """Sub-batches of one piece and of several, columns of units that are one task; n = 2 has moments as large as x."""
    torch.manual_seed(3)
    x = (torch.randn(shape) + 0.5).to(dtype)
    for form in FORMS:
        beta = beta_for(x, form, "channel", "units")
        num = {"num_sub_batches": shape[0] // n // 2 * 2}
        check(x, "cpu", beta=beta, form=form, sub_batch_size=n, **num, **per_unit(x, "channel"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(("form", "n"), [("ratio", 3), ("relative_variance", 4)])
def test_layouts(kernel_backend, layout, unit, form, n):
    torch.manual_seed(2)
    x = LAYOUTS[layout](torch.randn(14, 18, 6, 5).to(device_of(kernel_backend)))
    beta = beta_for(x, form, unit, "units")
    options = {"form": form, "unit": unit, "sub_batch_size": n}
    _, dx, _ = check(x, kernel_backend, beta=beta, **options, **per_unit(x, unit))
    if layout in ("contiguous", "channels_last", "transposed"):
        assert dx.stride() == x.stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_layouts_in_half_precision(kernel_backend, layout):
    torch.manual_seed(3)
    for dtype in (torch.bfloat16, torch.float16):
        x = LAYOUTS[layout](torch.randn(16, 19, 5, 7).to(device_of(kernel_backend)).to(dtype))
        check(x, kernel_backend, form="relative_variance", sub_batch_size=5)


UNLIKE_THEIR_FIRST_VALUES = {  # what a sum of squares around the first values would lose digits of
    "alike": lambda x: x,
    "border": lambda x: x.index_fill(2, torch.tensor(0, device=x.device), 10),
    "first vector": lambda x: torch.where(
        torch.arange(x[0, 0].numel(), device=x.device).view(x[0, 0].shape) < 16, 100, x
    ),
    "first sample": lambda x: torch.cat([x[:1] + 30, x[1:]]),
}


@pytest.mark.parametrize("change", UNLIKE_THEIR_FIRST_VALUES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_first_values_that_are_unlike_the_rest(kernel_backend, layout, change):
    torch.manual_seed(12)
    for P in (7, 14):
        x = torch.randn(20, 24, P, P).to(device_of(kernel_backend))  # channels enough that eager is not just lucky
        x = LAYOUTS[layout](UNLIKE_THEIR_FIRST_VALUES[change](x))
        for options in ({"sub_batch_size": 5}, {"form": "relative_variance", "sub_batch_size": 5}):
            check(x, kernel_backend, **options, **per_unit(x, "channel"))
        if kernel_backend == "cpu":
            of_eager, exact = (vk.reference.sub_batch_moments(x.to(t), 5) for t in (torch.float32, torch.float64))
            for found, e, o in zip(vk.sub_batch_moments(x, 5, backend="cpu"), of_eager, exact, strict=True):
                assert_within_budget(found, [e], o)


@pytest.mark.parametrize("kind", ["default", "scalar", "units"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_beta_and_reduction(backend, kind, reduction):
    torch.manual_seed(4)
    x = torch.randn(18, 71, 4).to(device_of(backend))
    for form in ("ratio", "relative_variance"):
        for unit in UNITS:
            shape = x.shape[1:2] if unit == "channel" else x.shape[1:]
            g = torch.rand(shape if reduction == "none" else ()).to(x.device)
            beta = beta_for(x, form, unit, kind)
            check(x, backend, g, beta, form=form, unit=unit, reduction=reduction)


@pytest.mark.parametrize("K", [2, 3, 4, 5])
def test_number_of_sub_batches(backend, K):
    torch.manual_seed(5)
    x = torch.randn(23, 6, 5).to(device_of(backend))
    for form in FORMS:
        _, dx = check(x, backend, form=form, sub_batch_size=4, num_sub_batches=K)
        taking_part = 4 * (K // 2 * 2 if form == "ratio" else K)
        assert (dx[taking_part:] == 0).all()
        assert (dx[:taking_part] != 0).any()


def test_expanded_and_other_upstream_gradients(backend):
    x = torch.randn(20, 6, 4).to(device_of(backend))
    check(x, backend, torch.ones((), device=x.device).expand(6), reduction="none")
    check(x, backend, torch.tensor(3.5, device=x.device))
    check(x, backend, torch.tensor(0.0, device=x.device))
    a, b = x.detach().requires_grad_(), x.detach().requires_grad_()
    vk.vcl_loss(a, reduction="none", backend=backend).sum().backward()
    vk.vcl_loss(b, reduction="sum", backend=backend).backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_expanded_input(backend):
    x = torch.randn(12, 1, 5).to(device_of(backend)).expand(12, 6, 5)
    check(x, backend, form="relative_variance", **per_unit(x, "channel"))


def test_backward_twice_and_accumulation(kernel_backend):
    for options in ({}, {"form": "relative_variance", "sub_batch_size": 4}):
        x = torch.randn(32, 5, 3).to(device_of(kernel_backend)).requires_grad_()
        loss = vk.vcl_loss(x, backend=kernel_backend, **options) * 0.3
        loss.backward(retain_graph=True)
        first = x.grad.clone()
        loss.backward()
        torch.testing.assert_close(x.grad, 2 * first)
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


def test_a_gradient_given_out_is_not_reused(kernel_backend):
    x = torch.randn(16, 5, 3).to(device_of(kernel_backend)).requires_grad_()
    loss = vk.vcl_loss(x, form="variance", sub_batch_size=4, backend=kernel_backend)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    expected = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(second, expected)


def test_input_is_not_modified(backend):
    x = torch.randn(16, 5, 6).to(device_of(backend))
    kept = x.clone()
    for form in FORMS:
        loss_of(x, None, backend, torch.tensor(2.0, device=x.device), form=form)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_mean_far_from_zero(kernel_backend, layout):
    torch.manual_seed(6)
    for shape in ((16, 6, 8, 8), (40, 3, 33, 20)):
        x = LAYOUTS[layout](torch.randn(shape).to(device_of(kernel_backend)) + 1e4)
        for form in FORMS:
            for unit in UNITS:
                check(x, kernel_backend, form=form, unit=unit, reduction="none", g=torch.ones(
                    x.shape[1:2] if unit == "channel" else x.shape[1:], device=x.device))  # fmt: skip


def test_zero_variance(backend):
    x = torch.full((12, 3, 4), 2.5, device=device_of(backend))
    loss, dx = loss_of(x, None, backend)
    assert loss == 1.0  # (1 - 0 / (0 + 1))²
    assert (dx == 0).all()
    loss, dx = loss_of(x, None, backend, form="relative_variance")
    assert loss == 0
    assert (dx == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_unit(backend, bad):
    x = torch.randn(20, 4, 9).to(device_of(backend))
    x[3, 1, 2] = bad
    loss, dx = loss_of(x, None, backend, torch.ones(4, device=x.device), reduction="none")
    assert loss.isnan().tolist() == [False, True, False, False]
    assert dx[:10, 1].isnan().all()
    assert dx[:, [0, 2, 3]].isfinite().all()
    x = torch.randn(20, 4, 9).to(device_of(backend))
    x[11, 1, 2] = bad  # takes no part
    loss, dx = loss_of(x, None, backend)
    assert loss.isfinite()
    assert dx.isfinite().all()


def test_no_channels(backend):
    x = torch.randn(12, 0, 4).to(device_of(backend)).requires_grad_()
    assert vk.vcl_loss(x, reduction="sum", backend=backend) == 0
    assert vk.vcl_loss(x, reduction="mean", backend=backend).isnan()
    assert vk.vcl_loss(x, reduction="none", backend=backend).shape == (0,)


def test_half_gradient_does_not_vanish_under_a_loss_scale(kernel_backend):
    """With a weight of 1e-3 it is below float16's least value; times 65536 it is not, if scaled before rounding."""
    x = torch.randn(32, 64, 8, 8).to(device_of(kernel_backend)).half().requires_grad_()
    loss = vk.vcl_loss(x, form="relative_variance", sub_batch_size=8, backend=kernel_backend)
    (dx,) = torch.autograd.grad(loss * 65.536, x)
    exact = oracle(x, None, torch.tensor(65.536), form="relative_variance", sub_batch_size=8)[1]
    assert exact.abs().max() / 65536 < 6e-8
    assert ((dx.cpu().double() - exact).abs() <= 1e-3 * exact.abs() + 6e-8).all()


def test_beta_below_its_minimum_may_only_rise(backend):
    from vcl_kernels.checks import check_loss
    from vcl_kernels.functional import activation_and_loss
    from vcl_kernels.options import IDENTITY

    torch.manual_seed(7)
    x = torch.randn(10, 40, 4).to(device_of(backend))
    beta = torch.full((40,), 1e-4, device=x.device, requires_grad=True)
    _, spec = check_loss(x, beta, 5, "ratio", "channel", None, "sum", weight=0.5, beta_min=1e-3)
    _, loss = activation_and_loss(x, beta, spec, IDENTITY, backend)
    at_minimum = torch.full((40,), 1e-3, device=x.device, requires_grad=True)
    expected = 0.5 * vk.vcl_loss(x, at_minimum, reduction="sum", backend=backend)
    torch.testing.assert_close(loss, expected)
    (got,), (free,) = torch.autograd.grad(loss, beta), torch.autograd.grad(expected, at_minimum)
    assert (free > 0).any()
    assert (free < 0).any()
    torch.testing.assert_close(got, free.clamp(max=0))


@pytest.mark.parametrize("units", [40, 1500])  # few enough for one program to sum them, and not
@pytest.mark.parametrize("form", ["ratio", "relative_variance"])
@pytest.mark.parametrize("rows", [10, 24])
def test_one_beta_below_its_minimum_may_only_rise_as_a_whole(kernel_backend, form, units, rows):
    torch.manual_seed(9)
    x = torch.randn(rows, units, 2).to(device_of(kernel_backend))
    found = []
    for backend in (kernel_backend, "reference"):
        vcl = vk.VCL((), form=form, beta_init=1e-4, beta_min=1e-3, backend=backend).to(x.device)
        vcl(x)
        (dbeta,) = torch.autograd.grad(vcl.loss, vcl.beta)
        found.append(dbeta)
    torch.testing.assert_close(*found)
    free = vk.VCL((), form=form, beta_init=1e-3, beta_min=1e-3, backend=kernel_backend).to(x.device)
    free(x)
    (dbeta,) = torch.autograd.grad(free.loss, free.beta)
    torch.testing.assert_close(found[0], dbeta.clamp(max=0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rows_past_the_last_sub_batch_where_samples_are_inside(kernel_backend, dtype):
    """Gradients that are made in backward write whole rows, which here do not lie one after another in x."""
    torch.manual_seed(0)
    x = LAYOUTS["samples_inside"](torch.randn(23, 6, 5, 4).to(device_of(kernel_backend))).to(dtype)
    check(x, kernel_backend, form="relative_variance", sub_batch_size=4)
