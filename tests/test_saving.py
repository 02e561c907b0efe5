"""What forward saves for backward, seen by PyTorch's hooks on saved tensors."""

import pytest
import torch
from common import named
from conftest import device_of

import vcl_kernels as vk


def saved(x, forward):
    """The saved tensors with rows as x has them: which, and how many rows. All others have few values."""
    tensors = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
        outputs = forward(x)
    names = {id(x): "x", id(outputs[0]): "y"}
    with_rows = [t for t in tensors if t.shape[1:] == x.shape[1:]]
    few = 8 * len(x) // 5 * x.shape[1]  # mean, scale, beta and dbeta, of each unit and sub-batch
    assert sum(t.numel() for t in tensors) <= sum(t.numel() for t in with_rows) + few
    return [(names.get(id(t), ""), len(t)) for t in with_rows]


@pytest.mark.parametrize(
    ("rows", "dtype", "options", "wanted"),
    [
        (20, torch.float32, {}, [("", 10)]),  # a pair has half of the rows: those are saved
        (19, torch.float32, {}, [("x", 19), ("", 19)]),  # one pass: dx, and x for second derivatives
        (19, torch.float16, {}, [("x", 19)]),  # backward makes dx, once it knows the upstream gradient
        (20, torch.float32, {"form": "variance"}, [("x", 20), ("", 20)]),
        (20, torch.float32, {"form": "variance", "num_sub_batches": 2}, [("", 10)]),
    ],
)
def test_a_loss(kernel_backend, rows, dtype, options, wanted):
    x = torch.randn(rows, 3, 4, dtype=dtype, device=device_of(kernel_backend), requires_grad=True)
    assert saved(x, lambda x: (vk.vcl_loss(x, backend=kernel_backend, **options),)) == wanted


def test_a_unit_that_fits_nowhere_is_read_again(kernel_backend):
    positions = 1 << (19 if kernel_backend == "cpu" else 13)
    x = torch.randn(4, 1, positions, device=device_of(kernel_backend), requires_grad=True)
    options = {"form": "variance", "sub_batch_size": 2, "backend": kernel_backend}
    assert saved(x, lambda x: (vk.vcl_loss(x, **options),)) == [("x", 4)]


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        *((name, {}, [("y", 20), ("", 10)]) for name in ("relu", "leaky_relu", "elu", "tanh")),  # derived from y
        *((name, {}, [("x", 20)]) for name in ("gelu", "gelu_tanh", "silu")),
        ("elu", {"alpha": -1.0}, [("x", 20)]),  # not monotone: y does not say which x it came from
        ("relu", {"sub_batch_size": 9}, [("y", 20), ("", 18)]),  # a pair, and not all rows
        ("relu", {"sub_batch_size": 10}, [("x", 20)]),
        ("relu", {"num_sub_batches": 4}, [("x", 20)]),
    ],
)
def test_an_activation_saves_one_tensor_as_if_bare_and_few_rows(kernel_backend, name, options, wanted):
    x = torch.randn(20, 3, 4, device=device_of(kernel_backend), requires_grad=True)
    beta = torch.ones(3, device=x.device, requires_grad=True)
    options = {**named(name), **options, "backend": kernel_backend}
    assert saved(x, lambda x: vk.vcl_activation(x, beta=beta, **options)) == wanted
