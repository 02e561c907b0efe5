"""What forward saves for backward, seen by PyTorch's hooks on saved tensors."""

import pytest
import torch
from conftest import device_of

import vcl_kernels as vk


def saved(x, forward):
    """The saved tensors with rows as x has them: which, and how many rows."""
    tensors = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
        outputs = forward(x)
    names = {id(x): "x", id(outputs[0]): "y"}
    return [(names.get(id(t), ""), len(t)) for t in tensors if t.shape[1:] == x.shape[1:]]


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
    x = torch.randn(8, 1, 1 << 18, device=device_of(kernel_backend), requires_grad=True)
    assert saved(x, lambda x: (vk.vcl_loss(x, form="variance", sub_batch_size=4, backend=kernel_backend),)) == [
        ("x", 8)
    ]


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("relu", {}, [("y", 20), ("", 10)]),  # its derivative follows from y
        ("elu", {"alpha": -1.0}, [("x", 20)]),  # not from that of a function that is not monotone
        ("gelu", {}, [("x", 20)]),
        ("relu", {"sub_batch_size": 9}, [("y", 20), ("", 18)]),  # a pair, and not all rows
        ("relu", {"sub_batch_size": 10}, [("x", 20)]),
        ("relu", {"num_sub_batches": 4}, [("x", 20)]),
    ],
)
def test_an_activation_saves_one_tensor_and_few_rows(kernel_backend, name, options, wanted):
    x = torch.randn(20, 3, 4, device=device_of(kernel_backend), requires_grad=True)
    assert saved(x, lambda x: vk.vcl_activation(x, name, backend=kernel_backend, **options)) == wanted
