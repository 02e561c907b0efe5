"""Private names of torch: what is done where a torch lacks them."""

import functools
import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad

import vcl_kernels as vk
from vcl_kernels import autograd, functional, torch_private

X = torch.randn(20, 4, 3, generator=torch.Generator().manual_seed(0))


def without(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    """The module as it is in a torch that lacks ``name``."""
    monkeypatch.delattr(name)
    spec = importlib.util.spec_from_file_location("torch_private_of_another_torch", torch_private.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, module.__name__, module)  # a compiler imports it by its name
    return module


# Of transforms and tracing


def test_transforms_are_refused_by_autograd_itself(monkeypatch):
    lacking = without(monkeypatch, "torch._C._are_functorch_transforms_active")
    monkeypatch.setattr(functional, "has_transform", lacking.has_transform)
    torch.testing.assert_close(vk.vcl_loss(X), vk.vcl_loss(X, backend="reference"))
    with pytest.raises(RuntimeError, match="functorch transforms"):
        grad(vk.vcl_loss)(X)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tangents_are_asked_of_tensors(monkeypatch):
    lacking = without(monkeypatch, "torch.autograd.forward_ad._current_level")
    assert not lacking.has_transform(X, None)
    with forward_ad.dual_level():
        assert lacking.has_transform(forward_ad.make_dual(X, X), None)
        assert lacking.has_transform(X, forward_ad.make_dual(X, X))
    monkeypatch.setattr(functional, "has_transform", lacking.has_transform)
    compiled = torch.compile(functools.partial(vk.vcl_loss, backend="cpu"), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X), vk.vcl_loss(X))


@pytest.mark.parametrize(
    ("name", "question"),
    [
        ("torch._C._len_torch_dispatch_stack", "is_traced"),
        ("torch._C._functorch.is_legacy_batchedtensor", "is_traced"),
        ("torch._C._functorch.is_functorch_wrapped_tensor", "is_traced"),
        ("torch._C._autograd._get_current_graph_task_keep_graph", "keeps_graph"),
    ],
)
def test_gradients_are_then_copied(monkeypatch, name, question):
    """The answer that is right of every tensor; gradients are the same, of upstream gradients of 1 and others."""
    lacking = without(monkeypatch, name)
    assert getattr(lacking, question)(*[X.sum()][: question == "is_traced"])
    monkeypatch.setattr(autograd, question, getattr(lacking, question))
    for g in (1.0, 0.3):
        x, beta = X.clone().requires_grad_(), torch.ones(4, requires_grad=True)
        (vk.vcl_loss(x, beta, form="relative_variance") * g).backward()
        y, gamma = X.clone().requires_grad_(), torch.ones(4, requires_grad=True)
        (vk.reference.vcl_loss(y, gamma, form="relative_variance") * g).backward()
        torch.testing.assert_close((x.grad, beta.grad), (y.grad, gamma.grad))
