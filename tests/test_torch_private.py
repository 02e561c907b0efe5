"""Private names of PyTorch: what each function does, and what it does where the name does not exist."""

import collections
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vcl_kernels import torch_private

# Of modules

Pair = collections.namedtuple("Pair", "first second")


def test_children_by_name():
    net = nn.Sequential(nn.ReLU(), nn.Tanh())
    assert torch_private.children(net) == {"0": net[0], "1": net[1]}
    without = SimpleNamespace(named_children=net.named_children)
    assert torch_private.children(without) == {"0": net[0], "1": net[1]}


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_are_found(kind):
    module = nn.ReLU()
    module.register_state_dict_pre_hook(print)
    assert not torch_private.has_hooks(module)
    handle = getattr(module, f"register_{kind}_hook")(print)
    assert torch_private.has_hooks(module)
    handle.remove()
    assert not torch_private.has_hooks(module)


def test_hooks_that_a_version_lacks():
    module = nn.ReLU()
    for name in torch_private.hooks_of(module):
        delattr(module, name)
    assert torch_private.hooks_of(module) == {}
    assert not torch_private.has_hooks(module)


@pytest.mark.parametrize("exists", [True, False])
def test_batch_norms_are_known(monkeypatch, exists):
    if not exists:
        monkeypatch.delattr(nn.modules.batchnorm, "_BatchNorm")
    types = torch_private.batch_norm_types()
    for norm in (nn.BatchNorm1d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2), nn.LazyBatchNorm2d()):
        assert isinstance(norm, types)
    assert not isinstance(nn.InstanceNorm1d(2), types)


def test_base_of_a_view():
    x = torch.zeros(2, 3)
    assert torch_private.base_of(x.T) is x
    assert torch_private.base_of(x) is x
    unknown = SimpleNamespace()
    assert torch_private.base_of(unknown) is unknown


@pytest.mark.parametrize("exists", [True, False])
def test_tensors_in_containers(monkeypatch, exists):
    if not exists:
        monkeypatch.setattr(torch_private, "pytree", None)
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    values = Pair({"a": a, "text": "x"}, [b, (c, None)])
    assert [len(t) for t in torch_private.tensors_in(values)] == [1, 2, 3]
    doubled = torch_private.map_tensors(lambda t: 2 * t, values)
    assert isinstance(doubled, Pair)
    assert doubled.first["text"] == "x"
    assert isinstance(doubled.second[1], tuple)
    assert doubled.second[1][1] is None
    assert [t.sum().item() for t in torch_private.tensors_in(doubled)] == [2, 4, 6]
