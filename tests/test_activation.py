"""vcl_activation: values, derivatives and memory beside the bare activation and the loss, on every backend."""

import subprocess
import sys

import pytest
import torch
from common import LAYOUTS, assert_within_budget
from conftest import UNITS, device_of
from torch.autograd.graph import saved_tensors_hooks

import vcl_kernels as vk
from vcl_kernels import reference
from vcl_kernels.checks import check_activation

ACTIVATIONS = ("relu", "leaky_relu", "elu", "gelu", "silu", "tanh", "identity")
PAIR = {"sub_batch_size": 4}  # y is saved, with the rows of one pair, where the derivative follows from it
ALL = {"sub_batch_size": 4, "form": "relative_variance"}  # x is saved
MODES = {"pair": PAIR, "all": ALL}


def results(function, x, name, beta, upstream, **options):
    """y, loss, dx, dbeta."""
    x, beta = x.detach().requires_grad_(), beta.detach().requires_grad_()
    y, loss = function(x, name, beta, **options)
    gradients = torch.autograd.grad([y, loss], [x, beta], upstream)
    return [y.detach(), loss.detach(), *gradients]


def check(x, name, backend, **options):
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    units = x.shape[1:] if options.get("unit") == "activation" else x.shape[1:2]
    beta = torch.rand(units, dtype=wide).to(x.device) + 0.5
    dy = torch.randn(x.shape).to(x.device).to(x.dtype)
    g = torch.rand(units, dtype=wide).to(x.device) + 0.5
    options = {**options, "reduction": "none"}
    actual = results(vk.vcl_activation, x, name, beta, [dy, g], backend=backend, **options)
    plain = vk.reference.vcl_activation
    exact, eager = (
        results(plain, x.cpu().to(d), name, beta.cpu().to(w), [dy.cpu().to(d), g.cpu().to(w)], **options)
        for d, w in ((torch.float64, torch.float64), (x.dtype, wide))
    )
    for a, e, o in zip(actual, eager, exact, strict=True):
        assert_within_budget(a, [e], o)
    assert actual[0].dtype == actual[2].dtype == x.dtype
    return actual


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(kernel_backend, name, mode, dtype):
    torch.manual_seed(0)
    x = (2 * torch.randn(21, 5, 7, 3).to(device_of(kernel_backend)) - 0.3).to(dtype)
    check(x, name, kernel_backend, **MODES[mode])


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(kernel_backend, layout, mode, unit):
    torch.manual_seed(1)
    x = LAYOUTS[layout](torch.randn(19, 6, 5, 4).to(device_of(kernel_backend)))
    check(x, "elu", kernel_backend, unit=unit, **MODES[mode])
    check(x, "silu", kernel_backend, unit=unit, **MODES[mode])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(33, 37), (12, 5, 18), (64, 16), (10, 3, 2, 3, 5), (10, 8, 48, 40)])
def test_shapes(backend, shape, mode):
    torch.manual_seed(2)
    check(torch.randn(shape).to(device_of(backend)), "relu", backend, **MODES[mode])


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((27, 256, 28, 28), torch.float32),
        ((43, 128, 40, 40), torch.bfloat16),
        ((42, 512, 14, 14), torch.float32),  # units that do not end on a vector
        ((42, 1024, 14, 14), torch.bfloat16),
        ((250, 20000), torch.float32),
    ],
)
def test_large_enough_to_stream(shape, dtype):
    torch.manual_seed(3)
    x = torch.randn(shape).to(dtype)
    assert x.numel() * x.element_size() >= 16 << 20
    check(x, "elu", "cpu", sub_batch_size=8, form="relative_variance")
    check(x, "leaky_relu", "cpu")
    check(x, "identity", "cpu", sub_batch_size=8, form="relative_variance")  # vcl_loss alone


def test_parameters_of_activations(kernel_backend):
    torch.manual_seed(4)
    x = torch.randn(20, 5, 6).to(device_of(kernel_backend))
    for options in (PAIR, ALL):
        check(x, "elu", kernel_backend, alpha=0.3, **options)
        check(x, "leaky_relu", kernel_backend, negative_slope=0.2, **options)
        check(x, "leaky_relu", kernel_backend, negative_slope=-0.2, **options)
        check(x, "gelu", kernel_backend, approximate="tanh", **options)


@pytest.mark.parametrize("mode", MODES)
def test_far_mean(kernel_backend, mode):
    torch.manual_seed(5)
    x = 1e4 + torch.randn(24, 6, 30).to(device_of(kernel_backend))
    check(x, "relu", kernel_backend, **MODES[mode])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["relu", "elu", "gelu"])
def test_one_upstream_alone_or_expanded(backend, name, mode):
    torch.manual_seed(6)
    x = torch.randn(20, 4, 6).to(device_of(backend)).requires_grad_()

    def run(function, pick, **more):
        y, loss = function(x, name, **MODES[mode], **more)
        return torch.autograd.grad(pick(y, loss), x)[0]

    for pick in (lambda y, loss: y.sum(), lambda y, loss: loss, lambda y, loss: y.mean() + 0.3 * loss):
        got, expected = run(vk.vcl_activation, pick, backend=backend), run(vk.reference.vcl_activation, pick)
        torch.testing.assert_close(got, expected)


def test_only_beta_or_nothing_wants_a_gradient(kernel_backend):
    x = torch.randn(20, 4, 6).to(device_of(kernel_backend))
    beta = torch.ones(4, device=x.device, requires_grad=True)
    y, loss = vk.vcl_activation(x, "elu", beta, backend=kernel_backend)
    torch.testing.assert_close(y, torch.nn.functional.elu(x))
    (got,) = torch.autograd.grad(loss, beta)
    (expected,) = torch.autograd.grad(vk.reference.vcl_loss(x, beta), beta)
    torch.testing.assert_close(got, expected)
    y, loss = vk.vcl_activation(x, "elu", backend=kernel_backend)
    assert not y.requires_grad
    assert not loss.requires_grad


def test_not_finite_values_propagate(kernel_backend):
    x = torch.randn(12, 6, 5).to(device_of(kernel_backend))
    x[0, 0, 0], x[1, 1, 1], x[11, 2, 2], x[11, 3, 3] = torch.nan, torch.inf, -torch.inf, torch.nan
    for name in ACTIVATIONS:
        y, loss = vk.vcl_activation(x, name, backend=kernel_backend, reduction="none")
        exact = reference.activate(x.double(), check_activation(name)).float()
        torch.testing.assert_close(y, exact, equal_nan=True)
        assert loss.isfinite().tolist() == [False, False, True, True, True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*ACTIVATIONS, "gelu_tanh"])
def test_far_values_as_in_eager_pytorch(kernel_backend, name, dtype):
    """Where a written-out exponential ends, and a NaN that is not the usual one."""
    approximate = "tanh" if name == "gelu_tanh" else "none"
    name = name.removesuffix("_tanh")
    far = [1e30, 1e20, 1e13, 1e4, 100.0, 88.75, 88.7228394, 88.7228317, 88.5, 87.5, 20.0, 9.0, 1e-3, 1e-37, 0.0]
    odd = torch.tensor([*far, *(-v for v in far), torch.inf, -torch.inf, torch.nan])
    odd = torch.cat([odd, torch.tensor([0x7FC00301, -0x3FFCFF]).int().view(torch.float32)])
    x = odd.expand(10, -1).to(dtype).to(device_of(kernel_backend)).contiguous().requires_grad_()
    y, _ = vk.vcl_activation(x, name, approximate=approximate, num_sub_batches=2, backend=kernel_backend)
    (dx,) = torch.autograd.grad(y.sum(), x)
    eager = reference.activate(x, check_activation(name, approximate=approximate))
    (wanted,) = torch.autograd.grad(eager.sum(), x)
    few_ulp = 8 * torch.finfo(dtype).eps
    for got, want in ((y, eager), (dx, wanted)):
        same = torch.isclose(got, want, rtol=few_ulp, atol=few_ulp, equal_nan=True)
        own_overflow, only_in_vector_code = want.isnan() & ~x.isnan(), got.isnan() & x.isnan()
        assert (same | own_overflow | only_in_vector_code).all(), (x[~same], got[~same], want[~same])
    assert y[x.isnan()].isnan().all()


@pytest.mark.parametrize("N", [64, 16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_saved_memory(name, N):
    x = torch.randn(N, 6, 10, 10, requires_grad=True)
    E, units, places = x.numel(), 6, []

    def saved(run):
        sizes = []
        places.clear()
        with saved_tensors_hooks(lambda t: sizes.append(t.numel()) or places.append(t.data_ptr()), lambda _: None):
            run()
        return sum(sizes)

    chosen = check_activation(name)
    bare = saved(lambda: reference.activate(x, chosen))
    assert bare == (0 if name == "identity" else E)
    small = 8 * 2 * units  # mean, scale, beta, dbeta
    pair = saved(lambda: vk.vcl_activation(x, name, torch.ones(6, requires_grad=True)))
    if name != "identity" or N == 64:  # the loss alone of few rows: x, and dx that it made
        assert pair <= bare + 2 * 5 * E // N + small
    if name != "identity":  # y is what the next layer saves too; x would be one tensor more
        assert (x.data_ptr() in places) != chosen.from_output
    every = saved(lambda: vk.vcl_activation(x, name, form="relative_variance", sub_batch_size=8))
    assert every <= (2 * E if name == "identity" else E) + 2 * 8 * units


def test_output_that_is_saved_must_not_change():
    y, loss = vk.vcl_activation(torch.randn(20, 4, requires_grad=True), "elu")
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (y.sum() + loss).backward()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["relu", "gelu"])
def test_compile(name, dynamic):
    torch._dynamo.reset()

    def step(x, w, beta):
        y, loss = vk.vcl_activation(x * w, name, beta, sub_batch_size=4)
        return y.square().mean() + 0.3 * loss

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (12, 20, 33):
        inputs = [torch.randn(rows, 6, 5), torch.randn(5), torch.rand(6) + 0.5]
        inputs = [t.requires_grad_() for t in inputs]
        got, expected = (torch.autograd.grad(f(*inputs), inputs) for f in (compiled, step))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_autocast():
    conv, x = torch.nn.Conv2d(3, 6, 3), torch.randn(20, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y, loss = vk.vcl_activation(conv(x), "elu")
    assert (y.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    (y.sum() + loss).backward()
    assert conv.weight.grad.isfinite().all()


def test_strides_of_the_result_and_of_the_gradient(kernel_backend):
    x = torch.randn(20, 6, 5, 4).to(device_of(kernel_backend)).to(memory_format=torch.channels_last)
    for options in (PAIR, ALL):
        leaf = x.detach().requires_grad_()
        y, loss = vk.vcl_activation(leaf, "elu", backend=kernel_backend, **options)
        dy = torch.randn(y.shape).to(x.device)  # in another layout than y
        (dx,) = torch.autograd.grad([y, loss], leaf, [dy, torch.ones_like(loss)])
        assert y.stride() == dx.stride() == x.stride()


REPEATED = """
import hashlib, sys, torch, vcl_kernels as vk
torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(0)
for shape, form in (((64, 6, 20, 20), "ratio"), ((64, 100, 7, 7), "relative_variance"), ((96, 900), "variance")):
    x = torch.randn(shape, requires_grad=True)
    y, loss = vk.vcl_activation(x, "elu", form=form)
    (y.square().sum() + loss).backward()
    print(hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in (y, loss, x.grad))).hexdigest())
"""


def test_bitwise_repeatable_whatever_the_threads():
    runs = {
        subprocess.run([sys.executable, "-c", REPEATED, threads], capture_output=True, text=True, check=True).stdout
        for threads in ("1", "1", "2", "3")
    }
    assert len(runs) == 1


def test_errors_name_the_argument():
    x = torch.randn(20, 4)
    for options, message in (
        ({"activation": "softplus"}, "activation must be one of"),
        ({"approximate": "erf"}, "approximate must be one of"),
        ({"alpha": None}, "alpha must be a float"),
        ({"negative_slope": "0.1"}, "negative_slope must be a float"),
        ({"sub_batch_size": 11}, "x has 20 samples"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            vk.vcl_activation(x, **options)
