"""Private names of torch: what is done where a torch lacks them."""

import collections
import functools
import importlib.util
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import grad
from torch.utils._python_dispatch import TorchDispatchMode

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


# Transforms and tracing


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
    inputs = X.clone().requires_grad_(), torch.ones(4, requires_grad=True)
    for g in (1.0, 0.3):
        losses = (function(*inputs, form="relative_variance") for function in (vk.vcl_loss, vk.reference.vcl_loss))
        torch.testing.assert_close(*(torch.autograd.grad(loss * g, inputs) for loss in losses))


# Modules


def test_bases():
    x, unknown = torch.zeros(2, 3), SimpleNamespace()
    for tensor, base in ((x.T, x), (x, x), (unknown, unknown)):
        assert torch_private.base_of(tensor) is base


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_are_found(kind):
    module = nn.ReLU()
    module.register_state_dict_pre_hook(print)
    assert not torch_private.has_hooks(module)
    handle = getattr(module, f"register_{kind}_hook")(print)
    assert torch_private.has_hooks(module)
    handle.remove()
    assert not torch_private.has_hooks(module)
    for name in torch_private.hooks_of(module):
        delattr(module, name)
    assert torch_private.hooks_of(module) == {}
    assert not torch_private.has_hooks(module)


def test_what_torch_compile_wraps(monkeypatch):
    module = nn.ReLU()
    assert torch_private.inside_compiled(module) is module
    compiled = torch.compile(nn.Sequential(module), backend="eager")
    assert torch_private.inside_compiled(compiled)[0] is module
    (name,) = (name for name, child in compiled.named_modules() if child is module)
    assert torch_private.plain_name(name) == "0" != name
    assert not torch_private.compiles_itself(module)
    module.compile(backend="eager")
    assert torch_private.compiles_itself(module)
    monkeypatch.delattr(module, "_compiled_call_impl")
    monkeypatch.delattr(nn.Module, "_compiled_call_impl", raising=False)
    assert not torch_private.compiles_itself(module)
    assert torch_private.may_be_compiled()
    monkeypatch.delitem(sys.modules, "torch._dynamo")
    assert not torch_private.may_be_compiled()


@pytest.mark.parametrize("exists", [True, False])
def test_dispatch_modes_are_left(monkeypatch, exists):
    if not exists:
        monkeypatch.delattr("torch.utils._python_dispatch._disable_current_modes")
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Mode():
        X + 1
        with torch_private.without_modes():
            X + 1
        X + 1
    with torch_private.without_modes():
        X + 1
    assert len(seen) == (2 if exists else 3)


@pytest.mark.parametrize("exists", [True, False])
def test_batch_norms_are_known(monkeypatch, exists):
    if not exists:
        monkeypatch.delattr(nn.modules.batchnorm, "_BatchNorm")
    types = torch_private.batch_norm_types()
    for norm in (nn.BatchNorm1d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2), nn.LazyBatchNorm2d()):
        assert isinstance(norm, types)
    assert not isinstance(nn.InstanceNorm1d(2), types)


@pytest.mark.parametrize("exists", [True, False])
def test_ops_are_watched(monkeypatch, exists):
    if not exists:
        monkeypatch.setattr(torch_private, "dispatch_mode", None)
        with pytest.raises(NotImplementedError, match="which ops run"):
            torch_private.watching_ops(print)
        net, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), torch.randn(2, 3)
        (note,) = vk.remove_batch_norm(net, x).notes
        assert "NotImplementedError" in note
        return
    seen = []
    x, y = torch.ones(2), torch.ones(2)
    with torch_private.watching_ops(seen.append):
        z = torch.cat([x, y])
    assert [t is wanted for t, wanted in zip(seen[0], (x, y), strict=True)] == [True, True]
    assert z.sum() == 4


# Nested containers

Pair = collections.namedtuple("Pair", "first second")


@pytest.mark.parametrize("exists", [True, False])
def test_tensors_in_containers(monkeypatch, exists):
    if not exists:
        monkeypatch.setattr(torch_private, "pytree", None)
    values = Pair({"a": torch.ones(1), "text": "x"}, [torch.ones(2), (torch.ones(3), None)])
    assert [len(t) for t in torch_private.tensors_in(values)] == [1, 2, 3]
    mapped = torch_private.map_tensors(len, values)
    assert mapped == Pair({"a": 1, "text": "x"}, [2, (3, None)])
    assert isinstance(mapped, Pair)


def test_a_function_is_marked_as_torch_marks_it():
    def ours():
        return True

    def torchs():
        return True

    assert vars(torch_private.while_tracing(ours)) == vars(torch.compiler.assume_constant_result(torchs)) != {}


def test_the_compiler_is_not_imported_with_the_package():
    code = "import sys, vcl_kernels; print('torch._dynamo' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"
