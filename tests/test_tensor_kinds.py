"""Tensors of other kinds, and what is no tensor: the right result, or an error that names the argument."""

import numpy as np
import pytest
import torch
from conftest import FORMS, UNITS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parameter import UninitializedParameter

import vcl_kernels as vk

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(Sparse|sparse|nested|quantize|torch.ao)",  # in a state of beta, or deprecated
)

X = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
FUNCTIONS = {
    "loss": vk.vcl_loss,
    "activation": vk.vcl_activation,
    "moments": lambda x: vk.sub_batch_moments(x, 5),
    "reference loss": vk.reference.vcl_loss,
    "reference activation": vk.reference.vcl_activation,
    "reference moments": lambda x: vk.reference.sub_batch_moments(x, 5),
    "VCL": lambda x: vk.VCL(6)(x),
    "VCLActivation": lambda x: vk.VCLActivation("elu", 6, inject=True)(x),
    "VCL of the first batch": lambda x: vk.VCL()(x),
    "VCL of a short batch": lambda x: vk.VCL(6, sub_batch_size=11)(x),
}
OF_BETA = [name for name in FUNCTIONS if "loss" in name or "activation" in name]


class NoTensor:
    """As numpy-like libraries have them."""

    @classmethod
    def __torch_function__(cls, *args, **kwargs):
        return None


def nested(x, layout=torch.strided):
    return torch.nested.nested_tensor([x, x[: len(x) // 2]], layout=layout)


def quantized(x):
    return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)


WRONG = {  # as x or beta, and what the error says of it
    "sparse": (lambda t: t.to_sparse(), "dense.*torch.sparse_coo"),
    "csr": (lambda t: t.view(-1, 2).to_sparse_csr(), "dense.*torch.sparse_csr"),
    "bsr": (lambda t: t.view(-1, 2).to_sparse_bsr((1, 2)), "dense.*torch.sparse_bsr"),
    "nested": (nested, "dense.*nested"),
    "jagged": (lambda t: nested(t, torch.jagged), "dense.*nested"),
    "mkldnn": (lambda t: t.to_mkldnn(), "dense.*torch._mkldnn"),
    "quantized": (quantized, "float.*torch.qint8"),
    "complex": (lambda t: t.to(torch.complex64), "float.*torch.complex64"),
    "integer": (lambda t: t.int(), "float.*torch.int32"),
    "bool": (lambda t: t > 0, "float.*torch.bool"),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), "float.*torch.float8_e4m3fn"),
    "without a shape": (lambda t: UninitializedParameter(), "a Tensor with a shape; got UninitializedParameter"),
    "numpy": (lambda t: t.numpy(), "Tensor; got ndarray"),
    "list": (lambda t: t.tolist(), "Tensor; got list"),
    "no tensor": (lambda t: NoTensor(), "Tensor; got NoTensor"),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_x_cannot_be(name, kind):
    make, message = WRONG[kind]
    with pytest.raises((TypeError, ValueError), match=f"x must be .*{message}"):
        FUNCTIONS[name](make(X))


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("name", OF_BETA)
def test_what_beta_cannot_be(name, kind):
    make, message = WRONG[kind]
    with pytest.raises((TypeError, ValueError), match=f"beta must be .*{message}"):
        FUNCTIONS[name](X, beta=make(torch.ones(6)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_x_and_no_dimension(name):
    with pytest.raises(TypeError, match="x must be a Tensor; got NoneType"):
        FUNCTIONS[name](None)
    with pytest.raises(ValueError, match=r"x must have 2 to 8 dimensions.*\(\)"):
        FUNCTIONS[name](torch.tensor(1.0))
    if name.startswith("VCL"):
        with pytest.raises(ValueError, match=r"x must have 2 to 8 dimensions.*\(6,\)"):  # also of a short batch
            FUNCTIONS[name](X[0])


@pytest.mark.parametrize("name", ["VCL", "VCLActivation", "VCL of the first batch"])
def test_a_meta_batch_and_a_beta_in_memory(name):
    with pytest.raises(ValueError, match="beta must be on x's device, meta; got cpu"):
        FUNCTIONS[name](X.to("meta"))
    with torch.device("meta"):
        vcl = vk.VCL()
    vcl(X.to("meta"))
    assert (vcl.loss.device.type, vcl.beta.shape) == ("meta", (6,))


@pytest.mark.parametrize("number", [1j, True, "1", np.float32(1)])
def test_numbers_that_beta_cannot_be(number):
    with pytest.raises(TypeError, match="beta must be a float or a Tensor"):
        vk.vcl_loss(X, number)
    assert vk.vcl_loss(X, np.float64(1)) == vk.vcl_loss(X, 1) == vk.vcl_loss(X)


class Counted(torch.Tensor):
    """A subclass that sees the calls of functions."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


class Special(torch.nn.Parameter):
    pass


def same_values():
    plain = torch.randn(20, 6, dtype=torch.complex64)
    yield "parameter", torch.nn.Parameter(X.clone()), X
    yield "subclass of a parameter", Special(X.clone()), X
    yield "subclass", X.as_subclass(Counted), X
    yield "negative bit", plain.conj().imag, -plain.imag
    yield "zeros without memory", torch._efficientzerotensor((20, 6)), torch.zeros(20, 6)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if "VCL" not in name])
def test_tensors_that_are_read_as_any(name):
    for kind, x, plain in same_values():
        found, wanted = FUNCTIONS[name](x), FUNCTIONS[name](plain)
        for a, b in zip(found, wanted, strict=True) if isinstance(found, tuple) else [(found, wanted)]:
            torch.testing.assert_close(a.detach().as_subclass(torch.Tensor), b, msg=kind)


def described(x, function):
    """Shape, strides and dtype of the results and of the gradient."""
    x = x.detach().requires_grad_()
    results = function(x)
    results = results if isinstance(results, tuple) else (results,)
    dx = torch.autograd.grad(results, x, [torch.ones_like(t) for t in results])
    return [(t.shape, t.stride(), t.dtype) for t in (*results, *dx)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("form", FORMS)
def test_meta_and_fake_tensors(form, unit, layout, dtype):
    x = torch.randn(20, 6, 3, 4).to(dtype).to(memory_format=layout)
    with FakeTensorMode():
        fake = torch.empty_strided(x.shape, x.stride(), dtype=dtype)
    options = {"form": form, "unit": unit}
    for function in (
        lambda x: vk.vcl_loss(x, **options),
        lambda x: vk.vcl_loss(x, reduction="none", **options),
        lambda x: vk.vcl_activation(x, "elu", **options),
        lambda x: vk.vcl_activation(x, "gelu", **options),
        lambda x: vk.sub_batch_moments(x, 5, unit=unit),
    ):
        wanted = described(x, function)
        assert described(x.to("meta"), function) == wanted
        with fake.fake_mode:
            assert described(fake, function) == wanted
