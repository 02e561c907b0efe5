"""How launches of the Triton backend are decided."""

import pytest
import torch
from conftest import GPU

from benchmarks.launches import activation_jobs, loss_jobs, recorded, spec_of
from benchmarks.structure.build import specialise
from vcl_kernels.checks import check_loss

pytestmark = pytest.mark.skipif(GPU, reason="its tensors are on the CPU, which takes the interpreter")


def kernels_of(shapes, form="relative_variance", dtype=torch.float32):
    """What is compiled for a loss and an activation, forward and backward, of tensors of these shapes."""
    found = set()
    for shape in shapes:
        x = torch.empty(shape, dtype=dtype, device="meta")
        spec = spec_of(x, form)
        for job in {**loss_jobs(x, spec), **activation_jobs(x, spec, "gelu")}.values():
            found |= {specialise(one) for one in recorded(job)}
    return found


def test_changing_sizes_share_kernels():
    """Images of any size, and any number of channels: P, n, U and distances are given at run time."""
    few = kernels_of((32, 64, size, size) for size in (36, 44))
    many = kernels_of((32, 64, size, size + 4 * more) for size in range(36, 64, 4) for more in range(4))
    assert many == few
    wide = kernels_of((32, channels, 40, 40) for channels in range(520, 1000, 8))
    assert len(wide) == len(kernels_of([(32, 520, 40, 40)]))


def test_odd_sizes_have_kernels_by_their_alignment():
    assert len(kernels_of((32, 16, size, size) for size in range(33, 97, 2))) == len(kernels_of([(32, 16, 33, 33)]))


def test_one_pass_of_what_does_not_fit_in_the_layout_that_a_compiler_chose():
    """Whether a unit fits is asked of the layout of tracing: contiguous, where more fits than in channels_last."""
    from vcl_kernels.backends.triton import launchers

    x = torch.randn(10, 8, 24, 24)
    moved = x.to(memory_format=torch.channels_last)
    assert launchers.one_pass(x, 5, 2, False)
    assert not launchers.one_pass(moved, 5, 2, False)
    _, spec = check_loss(x, 0.5, 5, "ratio", "channel", None, "mean")
    for a, b in zip(
        launchers.loss_dx(moved, None, *spec, False), launchers.loss_dx(x, None, *spec, False), strict=True
    ):
        torch.testing.assert_close(a, b)
