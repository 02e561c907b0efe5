"""How launches of the Triton backend are decided."""

import pytest
import torch
from conftest import GPU

import vcl_kernels as vk
from vcl_kernels.backends.triton import launch as launching
from vcl_kernels.checks import check_loss

pytestmark = pytest.mark.skipif(GPU, reason="its tensors are on the CPU, which takes the interpreter")


def test_changing_positions_share_a_kernel_in_the_end(monkeypatch):
    monkeypatch.setattr(launching, "_constant_positions", set())
    constants = [launching.positions_constant(P) for P in range(100, 160)]
    assert constants[0] == 100
    assert set(constants[20:]) == {0}
    assert launching.positions_constant(100) == 100


def test_run_time_positions_give_the_same(monkeypatch):
    x = torch.randn(20, 3, 9, 11, requires_grad=True)
    results = []
    for seen in (set(), set(range(-16, 0))):
        monkeypatch.setattr(launching, "_constant_positions", seen)
        for options in ({}, {"form": "variance"}):
            loss = vk.vcl_loss(x, backend="triton", **options)
            results.append((loss.detach(), *torch.autograd.grad(loss, x)))
    for constant, run_time in zip(results[:2], results[2:], strict=True):
        assert torch.equal(constant[0], run_time[0])
        assert torch.equal(constant[1], run_time[1])


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
