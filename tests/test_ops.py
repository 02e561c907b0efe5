"""The registered ops: opcheck, arguments of any layout, no read past a tensor, the same bits in every run."""

import math
import os
import subprocess
import sys

import pytest
import torch
from common import LAYOUTS, as_tuple, assert_all_close, ops_of
from conftest import device_of

from vcl_kernels.options import IDENTITY, UNITS
from vcl_kernels.reference import activate

ELU, GELU_TANH = (3, 1.0), (5, 0.0)

X = {
    "contiguous": lambda: torch.randn(16, 5, 3, 4),
    "2d_bfloat16": lambda: torch.randn(16, 7).bfloat16(),
    **{  # the second no kernel reads where it lies; results of the third lie without its gaps
        layout: lambda layout=layout: LAYOUTS[layout](torch.randn(16, 5, 3, 4))
        for layout in ("channels_last", "every_second_column", "channel_slice")
    },
}


def spec(form, K, per_activation, reduce):
    """Arguments that stand for a LossSpec: beta's number, its minimum, n, K, form, unit, factor, reduce."""
    return 0.5, -math.inf, 4, K, form, per_activation, 0.2, reduce


def calls(ops, x, per_activation):
    """Name and arguments of every op, for x of 16 rows in sub-batches of 4; those of backward come from forward."""
    units = x.shape[1:] if per_activation else x.shape[1:2]
    g, one_beta = x.new_tensor(0.5, dtype=torch.float32), x.new_tensor(0.7, dtype=torch.float32)
    beta = torch.rand(units).to(x.device) + 0.5
    ratio, variance = spec(0, 2, per_activation, True), spec(1, 4, per_activation, False)
    yield "loss_dx", (x, one_beta, *ratio, True)
    for t, values, activation, rows_kept in ((beta, ratio, ELU, True), (None, variance, GELU_TANH, False)):
        learnt = t is not None
        yield "loss", (x, t, *values)
        yield "loss_dx", (x, t, *values, learnt)
        yield "loss_coefficients", (x, t, *values, learnt, rows_kept)
        yield "activation", (x, t, *values, *activation, learnt, rows_kept)
        y, _, mean, scale, _, rows = ops.activation(x, t, *values, *activation, learnt, rows_kept)
        saved = (y, rows, True) if rows_kept else (x, None, False)
        rest = (mean, scale, None, g, *activation, 4, len(mean), per_activation, 16)
        yield "activation_dx", (*saved, torch.randn_like(y), *rest)
        yield "activation_dx", (*saved, None, *rest)
    yield "moments", (x, 4, 3, per_activation)
    mean, var = ops.moments(x, 4, 3, per_activation)
    yield "moments_dx", (x, mean, var, None, g, 4, 3, per_activation, 20)
    yield "moments_dx", (x, mean, var, mean, None, 4, 3, per_activation, 16)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("x", X)
def test_opcheck(x, unit):
    ops = torch.ops.vcl_kernels
    for name, arguments in calls(ops, X[x](), unit == "activation"):
        torch.library.opcheck(getattr(ops, name).default, arguments)


@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize("wants_gradient", [False, True])
@pytest.mark.parametrize("x", [torch.randn(16, 5, 3, 4).to(memory_format=torch.channels_last), torch.randn(44, 7)])
def test_opcheck_of_the_ops_with_autograd(x, wants_gradient, learnt):
    """Half of the rows take part, or fewer than a quarter."""
    ops = torch.ops.vcl_kernels
    x = x.clone().requires_grad_(wants_gradient)
    beta = (torch.rand(x.shape[1]) + 0.5).requires_grad_(wants_gradient) if learnt else None
    values = (x, beta, *spec(0, 2, False, True))
    torch.library.opcheck(ops.loss_autograd.default, values)
    for upstream in (None, torch.tensor(0.5)):
        torch.library.opcheck(ops.activation_autograd.default, (*values, *ELU, upstream))
    if not learnt:
        torch.library.opcheck(ops.moments_autograd.default, (x, 4, 3, False))


def test_ops_read_nothing_past_their_tensors(kernel_backend):
    """Called without the checks of the public functions: errors, where they would have read what lies beyond."""
    ops = ops_of(kernel_backend)
    x = torch.randn(16, 5, 3).to(device_of(kernel_backend))
    beta, right = torch.ones(5, device=x.device), spec(0, 4, False, True)
    mean, var = ops.moments(x, 4, 4, False)
    saved = (x[:12], None, True, x, mean[:3], var[:3], None, None)
    for name, arguments, message in (
        *(
            (op, (x, beta, *right[:2], n, K, *right[4:], *more), "16 rows")
            for n, K in ((5, 4), (4, 6))
            for op, more in (("loss", ()), ("loss_dx", (True,)), ("loss_coefficients", (True, False)))
        ),
        ("moments", (x, 4, 5, False), "16 rows"),
        ("loss", (x, beta[:3], *right), "each unit"),
        ("loss", (x, beta, *right[:4], 3, *right[5:]), "form must be from 0 to 2, got 3"),
        ("activation", (x, beta, *right, -1, 0.0, True, False), "activation must be from 0 to 7, got -1"),
        ("moments_dx", (x, mean, var, None, None, 4, 4, False, 15), "rows"),
        ("activation_dx", (*saved, 1, 0.0, 4, 3, False, 16), "rows"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            getattr(ops, name)(*arguments)


def test_an_upstream_gradient_multiplies_the_shift_too(kernel_backend):
    x = torch.randn(16, 5, 3).to(device_of(kernel_backend))
    mean, scale, shift = torch.randn(3, 4, 5).to(x)
    g = x.new_tensor(2.0)
    with_g, without = (ops_of(kernel_backend).moments_dx(x, mean, scale, shift, u, 4, 4, False, 16) for u in (g, None))
    assert torch.equal(with_g, 2 * without)


def test_the_identity_is_an_activation_too(kernel_backend):
    """The public functions take it for the loss alone; the ops do not."""
    x = torch.randn(16, 5, 3).to(device_of(kernel_backend))
    y, *_ = ops_of(kernel_backend).activation(x, None, *spec(0, 2, False, True), *IDENTITY, False, False)
    assert torch.equal(y, activate(x, IDENTITY))


def laid_out(order):
    """A function that gives a tensor's dimensions another order in memory, and gaps."""

    def function(t):
        of_t = order if t.dim() == 4 else range(t.dim())[::-1]
        wide = t.new_full([2 * t.shape[d] for d in of_t], torch.nan)
        view = wide[tuple(slice(None, None, 2) for _ in of_t)].permute([of_t.index(d) for d in range(t.dim())])
        return view.copy_(t)

    return function


CHOSEN = [*map(laid_out, [(0, 2, 1, 3), (3, 1, 2, 0), (0, 3, 2, 1)]), LAYOUTS["row_stride"]]


@pytest.mark.parametrize("first", range(len(CHOSEN)))
@pytest.mark.parametrize("unit", UNITS)
def test_whatever_layout_a_compiler_chooses(kernel_backend, unit, first):
    """Each argument may have another layout than x."""
    ops = ops_of(kernel_backend)
    x = torch.randn(16, 5, 3, 4).to(device_of(kernel_backend))
    for name, arguments in calls(ops, x, unit == "activation"):
        moved = [
            CHOSEN[(first + i) % len(CHOSEN)](t) if isinstance(t, torch.Tensor) and t.dim() else t
            for i, t in enumerate(arguments)
        ]
        op = getattr(ops, name)
        assert_all_close(as_tuple(op(*moved)), as_tuple(op(*arguments)))


PROGRAM = """
import hashlib, torch, vcl_kernels as vk
torch.manual_seed(0)
digest = hashlib.sha256()
for shape in ((64, 32, 14, 14), (64, 3, 100, 40), (300, 200), (40, 9, 7, 7)):
    names = ("elu", "relu", "leaky_relu", "gelu", "gelu_tanh", "silu", "tanh")[: 7 if shape[0] == 40 else 1]
    for layout in (torch.contiguous_format, torch.channels_last)[: len(shape) // 2]:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            x = torch.randn(shape).to(dtype).to(memory_format=layout).requires_grad_()
            for form in ("ratio", "relative_variance"):
                loss = vk.vcl_loss(x, form=form)
                found = [loss, *torch.autograd.grad(loss, x)]
                for name in names:
                    kind = {"approximate": "tanh"} if name == "gelu_tanh" else {}
                    y, loss = vk.vcl_activation(x, name.removesuffix("_tanh"), form=form, **kind)
                    found += [y, *torch.autograd.grad(y.sum() + loss, x)]
                for t in found:
                    t = t.detach().double()
                    digest.update(t.numpy().tobytes())
                    print(float(t.norm()))
print(digest.hexdigest())
"""


def lines_of_program(**environment):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_bitwise_repeatable_whatever_the_threads():
    assert len({lines_of_program(OMP_NUM_THREADS=threads)[-1] for threads in ("1", "3", "3")}) == 1


def test_every_instruction_set_agrees():
    sets = (lines_of_program(VCL_KERNELS_CPU=name)[:-1] for name in ("baseline", "avx2", "avx512"))
    baseline, *others = (torch.tensor([float(norm) for norm in lines]) for lines in sets)
    for norms in others:
        torch.testing.assert_close(norms, baseline, rtol=2e-4, atol=0)
