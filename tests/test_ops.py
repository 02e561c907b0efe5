"""The registered ops under torch.library.opcheck, torch.compile, checkpointing and threads."""

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import FORMS, UNITS, device_of
from torch._inductor.utils import run_and_get_code
from torch.utils.checkpoint import checkpoint

import vcl_kernels as vk
from vcl_kernels import ops
from vcl_kernels.backends import triton_backend
from vcl_kernels.backends.interface import Coefficients, Saved
from vcl_kernels.checks import check_activation, check_loss
from vcl_kernels.options import SubBatches

registered = torch.ops.vcl_kernels


def inputs():
    yield torch.randn(16, 5, 3, 4)
    yield torch.randn(16, 5, 3, 4).to(memory_format=torch.channels_last)
    yield torch.randn(16, 7).bfloat16()
    yield torch.randn(16, 3, 5, 4).transpose(1, 2)  # which no kernel reads where it lies
    yield torch.randn(16, 8, 3, 4)[:, :5]  # which kernels do, and give results without its gaps


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form, unit):
    for x in inputs():
        beta, spec = check_loss(x, None if form == "variance" else 0.5, 4, form, unit, None, "mean")
        for s in (spec, spec._replace(reduce=False)):
            torch.library.opcheck(registered.loss.default, (x, beta, *s))
            torch.library.opcheck(registered.loss_dx.default, (x, beta, *s, False))
            for keep_rows in (False, True):
                torch.library.opcheck(registered.loss_coefficients.default, (x, beta, *s, False, keep_rows))
            if form != "variance":
                torch.library.opcheck(registered.loss_dx.default, (x, torch.tensor(0.5), *s, True))
        per_activation = unit == "activation"
        torch.library.opcheck(registered.moments.default, (x, 4, 3, per_activation))
        mean, var = registered.moments.default(x, 4, 3, per_activation)
        torch.library.opcheck(
            registered.moments_dx.default, (x, mean, var, None, torch.tensor(0.5), 4, 20, per_activation)
        )
        torch.library.opcheck(registered.moments_dx.default, (x, mean, var, mean, None, 4, 16, per_activation))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", ["elu", "gelu"])
def test_opcheck_of_activations(name, unit):
    activation, per_activation = check_activation(name, 1.0, 0.01, "tanh"), unit == "activation"
    for x in inputs():
        for beta, form in ((0.5, "ratio"), (torch.tensor(0.5), "relative_variance")):
            beta, spec = check_loss(x, beta, 4, form, unit, None, "mean")
            for keep_rows in (False, True):
                args = (x, beta, *spec, beta is not None, *activation, keep_rows)
                torch.library.opcheck(registered.activation.default, args)
                y, _, mean, scale, _, rows = registered.activation.default(*args)
                saved = y if keep_rows and activation.from_output else x
                rest = (mean, scale, torch.tensor(0.5), 4, x.shape[0], per_activation, *activation)
                from_output = saved is y
                torch.library.opcheck(
                    registered.activation_dx.default,
                    (saved, from_output, rows if keep_rows else None, torch.randn_like(y), *rest),
                )
                if keep_rows:
                    torch.library.opcheck(registered.activation_dx.default, (None, True, rows, None, *rest))


def ops_of(backend):
    """The backend's ops, of which the interpreter's are not registered."""
    return triton_backend() if (backend, device_of(backend)) == ("triton", "cpu") else ops


def test_ops_read_nothing_past_their_tensors(kernel_backend):
    """Called without the checks of the public functions: errors, where they would have read what lies beyond."""
    backend = ops_of(kernel_backend)
    x = torch.randn(16, 5, 3, device=device_of(kernel_backend))
    beta, spec = check_loss(x, torch.ones(5, device=x.device), 4, "ratio", "channel", 4, "mean")
    for wrong in (spec._replace(n=5), spec._replace(K=6)):
        for op, rest in (("loss", ()), ("loss_dx", (True,)), ("loss_coefficients", (True, False))):
            with pytest.raises((ValueError, RuntimeError), match="16 rows"):
                getattr(backend, op)(x, beta, wrong, *rest)
    with pytest.raises((ValueError, RuntimeError), match="16 rows"):
        backend.moments(x, SubBatches(4, 5, False))
    with pytest.raises((ValueError, RuntimeError), match="each unit"):
        backend.loss(x, beta[:3], spec)
    mean, var = backend.moments(x, SubBatches(4, 4, False))
    with pytest.raises((ValueError, RuntimeError), match="rows"):
        backend.moments_dx(x, Coefficients(mean, var), None, SubBatches(4, 4, False), 15)
    saved, relu = Saved(x[:12], None, True), check_activation("relu")
    with pytest.raises((ValueError, RuntimeError), match="rows"):
        backend.activation_dx(saved, x, Coefficients(mean[:3], var[:3]), None, relu, SubBatches(4, 3, False), 16)


def laid_out(t, order):
    """``t`` with its dimensions in another order in memory, and gaps."""
    wide = t.new_full([2 * t.shape[d] for d in order], torch.nan)
    view = wide[tuple(slice(None, None, 2) for _ in order)].permute([order.index(d) for d in range(t.dim())])
    return view.copy_(t)


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (3, 1, 2, 0), (0, 3, 2, 1)])
@pytest.mark.parametrize("unit", UNITS)
def test_whatever_layout_a_compiler_chooses(kernel_backend, unit, order):
    """Of every argument by itself, not only as x lies."""
    device = device_of(kernel_backend)
    backend = ops_of(kernel_backend)
    x = torch.randn(16, 5, 3, 4, device=device)
    units = x.shape[1:] if unit == "activation" else x.shape[1:2]
    beta, spec = check_loss(x, torch.rand(units, device=device) + 0.5, 4, "ratio", unit, 2, "none")
    chosen = check_activation("elu")

    def other(t):
        return laid_out(t, order[: t.dim()] if t.dim() == 4 else tuple(reversed(range(t.dim()))))

    cut = spec.sub_batches
    for call in (
        lambda x, beta: [backend.loss(x, beta, spec)],
        lambda x, beta: backend.loss_coefficients(x, beta, spec, True, True),
        lambda x, beta: backend.loss_dx(x, beta, spec, True),
        lambda x, beta: backend.moments(x, cut),
        lambda x, beta: backend.activation(x, beta, spec, chosen, True, True),
    ):
        torch.testing.assert_close(call(other(x), other(beta)), call(x, beta))
    y, _, (mean, scale, _), _, rows = backend.activation(x, beta, spec, chosen, True, True)
    g = x.new_tensor(0.5)

    def dx(y, rows, dy, mean, scale):
        return backend.activation_dx(Saved(y, rows, True), dy, Coefficients(mean, scale), g, chosen, cut, 16)

    tensors = [y, rows, torch.randn_like(y), mean, scale]
    wanted = dx(*tensors)
    for index, t in enumerate(tensors):
        torch.testing.assert_close(dx(*tensors[:index], other(t), *tensors[index + 1 :]), wanted)
    wanted = dx(None, rows, None, mean, scale)
    gaps = torch.stack([rows, rows], 1)[:, 0]  # between samples
    torch.testing.assert_close(dx(None, gaps, None, mean, scale), wanted)
    torch.testing.assert_close(dx(y, other(rows), None, mean, scale), wanted)
    moved = backend.moments_dx(other(x), Coefficients(other(mean), other(scale), other(mean)), None, cut, 16)
    torch.testing.assert_close(moved, backend.moments_dx(x, Coefficients(mean, scale, mean), None, cut, 16))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:dynamo_pgo force disabled")
@pytest.mark.parametrize("unit", UNITS)
def test_inductor_gives_convolutions_the_layout_that_it_likes(unit):
    """And VCL takes it as it is: eager convolutions are contiguous here, Inductor's channels_last."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    conv, options = torch.nn.Conv2d(4, 32, 3), {"form": "relative_variance", "sub_batch_size": 4, "unit": unit}
    x, beta = torch.randn(20, 4, 10, 10), torch.rand((32, 8, 8) if unit == "activation" else 32) + 0.5
    wanted = [*conv.parameters(), beta.requires_grad_()]

    def step():
        y, loss = vk.vcl_activation(conv(x), "elu", beta, **options)
        return y.square().mean() + 0.3 * loss

    with torch._inductor.config.patch(force_disable_caches=True):
        loss, codes = run_and_get_code(torch.compile(step, fullgraph=True))
    (convolved,) = re.findall(r"(\w+) = extern_kernels.convolution\(", codes[0])
    assert re.search(rf"assert_size_stride\({convolved}, \(20, 32, 8, 8\), \(2048, 1, 256, 32\)", codes[0])
    assert f"vcl_kernels.activation.default({convolved}," in codes[0]
    for a, b in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(step(), wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("options", [{}, {"form": "relative_variance", "unit": "activation"}, {"form": "variance"}])
def test_compile(options, dynamic):
    torch._dynamo.reset()

    def step(x, w):
        return (vk.vcl_loss(x * w, sub_batch_size=4, **options) * 0.3 + x.mean()) * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (12, 20, 33):
        x, w = torch.randn(rows, 6, 5, requires_grad=True), torch.randn(5, requires_grad=True)
        for got, expected in zip(
            torch.autograd.grad(compiled(x, w), (x, w)), torch.autograd.grad(step(x, w), (x, w)), strict=True
        ):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_counts_the_loss_once(use_reentrant):
    x = torch.randn(20, 6, 4, requires_grad=True)
    loss = checkpoint(lambda x: vk.vcl_loss(x * 2, form="variance"), x, use_reentrant=use_reentrant)
    (got,) = torch.autograd.grad(loss, x) if not use_reentrant else (loss.backward(), x.grad)[1:]
    (expected,) = torch.autograd.grad(vk.vcl_loss(x * 2, form="variance"), x)
    torch.testing.assert_close(got, expected)


def run_in_process(code, **env):
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


CODE = """
import hashlib, torch, vcl_kernels as vk
torch.manual_seed(0)
digest = hashlib.sha256()
for shape in ((64, 32, 14, 14), (64, 3, 100, 40), (300, 200), (40, 9, 7, 7)):
    for layout in (torch.contiguous_format, torch.channels_last):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            x = torch.randn(shape).to(dtype)
            x = x.to(memory_format=layout) if x.dim() == 4 else x
            x.requires_grad_()
            for form in ("ratio", "relative_variance"):
                loss = vk.vcl_loss(x, form=form)
                (dx,) = torch.autograd.grad(loss, x)
                digest.update(dx.double().numpy().tobytes() + loss.double().detach().numpy().tobytes())
                if PRINT: print(float(loss), float(dx.double().norm()))
            if shape[0] != 40: continue
            for name in ("relu", "leaky_relu", "elu", "gelu", "gelu_tanh", "silu", "tanh"):
                approximate = "tanh" if name == "gelu_tanh" else "none"
                kind = {"activation": name.removesuffix("_tanh"), "approximate": approximate}
                y, loss = vk.vcl_activation(x, **kind, form="relative_variance")
                (dx,) = torch.autograd.grad(y.sum() + loss, x)
                y = y.detach().double()
                digest.update(dx.double().numpy().tobytes() + y.numpy().tobytes())
                if PRINT: print(float(y.norm()), float(dx.double().norm()))
if not PRINT: print(digest.hexdigest())
"""


def test_bitwise_repeatable_whatever_the_threads():
    results = {run_in_process("PRINT = False" + CODE, OMP_NUM_THREADS=n) for n in ("1", "2", "2")}
    assert len(results) == 1


def test_every_instruction_set_agrees():
    rows = [
        [float(v) for v in run_in_process("PRINT = True" + CODE, VCL_KERNELS_CPU=isa).split()]
        for isa in ("baseline", "avx2", "avx512")
    ]
    for row in rows[1:]:
        torch.testing.assert_close(torch.tensor(row), torch.tensor(rows[0]), rtol=2e-4, atol=0)
