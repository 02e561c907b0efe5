"""What a caller can give: tensors of every kind are read right, or refused by an error that names the argument."""

import numpy as np
import pytest
import torch
from common import LEARNED, as_tuple, assert_all_close, results
from torch import _efficientzerotensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parameter import UninitializedParameter

import vcl_kernels as vk
from vcl_kernels.backends import cpu
from vcl_kernels.options import FORMS, UNITS

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(Sparse|sparse|nested|quantize|torch.ao)",  # in a state of beta, or deprecated
)

X = torch.randn(20, 6, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("args", "options", "error", "match"),
    [
        ((X[:9],), {}, ValueError, "x has 9 samples.*at least 10"),
        ((X,), {"num_sub_batches": 5}, ValueError, "x has 20 samples.*num_sub_batches=5.*25"),
        ((X,), {"num_sub_batches": 1}, ValueError, "num_sub_batches must be at least 2; got 1"),
        ((X,), {"sub_batch_size": 0}, ValueError, "sub_batch_size must be at least 1; got 0"),
        ((X,), {"sub_batch_size": 2.0}, TypeError, "sub_batch_size must be an int"),
        ((X,), {"sub_batch_size": 1, "unit": "activation"}, ValueError, "sub_batch_size=1 gives 1 value"),
        ((X[..., 0],), {"sub_batch_size": 1}, ValueError, "sub_batch_size=1 gives 1 value"),
        ((X, torch.ones(5)), {}, ValueError, r"beta must have shape \(\) or \(6,\).*\(5,\)"),
        ((X, torch.ones(6)), {"unit": "activation"}, ValueError, r"\(6, 4\)"),
        ((X, torch.ones(6, device="meta")), {}, ValueError, "beta must be on x's device, cpu; got meta"),
        ((X, torch.ones(6, dtype=torch.float64)), {}, TypeError, "beta must be torch.float32.*float64"),
        *(
            ((X, number), {}, TypeError, "beta must be a float or a Tensor")
            for number in (1j, True, "1", np.float32(1))
        ),
        ((X, 1.0), {"form": "variance"}, ValueError, "takes no beta; got 1.0"),
        ((X,), {"form": "var"}, ValueError, "form must be one of 'ratio'.*got 'var'"),
        ((X,), {"unit": ["channel"]}, ValueError, r"unit must be one of.*\['channel'\]"),
        ((X,), {"unit": "neuron"}, ValueError, "unit must be one of.*'neuron'"),
        ((X,), {"reduction": "max"}, ValueError, "reduction must be one of.*'max'"),
        ((X,), {"backend": "cuda"}, ValueError, "backend must be None or one of.*'cuda'"),
        ((X,), {"activation": "softplus"}, ValueError, "activation must be one of"),
        ((X,), {"approximate": "erf"}, ValueError, "approximate must be one of"),
        ((X,), {"alpha": None}, TypeError, "alpha must be a float"),
        ((X,), {"negative_slope": "0.1"}, TypeError, "negative_slope must be a float"),
    ],
)
def test_errors_name_the_argument(args, options, error, match):
    of_activation = {"activation", "approximate", "alpha", "negative_slope"} & set(options)
    with pytest.raises(error, match=match):
        vk.vcl_activation(*args, **options) if of_activation else vk.vcl_loss(*args, **options)


def test_what_was_checked_before_is_not_taken_for_what_equals_it():
    vk.vcl_loss(X, sub_batch_size=1)
    with pytest.raises(TypeError, match="sub_batch_size must be an int; got True"):
        vk.vcl_loss(X, sub_batch_size=True)
    vk.vcl_loss(X, torch.ones(6))
    with pytest.raises(ValueError, match=r"beta must have shape"):
        vk.vcl_loss(X, torch.ones(6), unit="activation")
    assert vk.vcl_loss(X, np.float64(1)) == vk.vcl_loss(X, 1) == vk.vcl_loss(X)


@pytest.mark.parametrize("n", [1, 7])
def test_the_number_of_samples_that_moments_need(n):
    vk.sub_batch_moments(X[:n], n)
    for size, K in ((n + 1, 1), (n, 2)):
        message = f"x has {n} samples; sub_batch_size={size} with num_sub_batches={K} needs"
        with pytest.raises(ValueError, match=message):
            vk.sub_batch_moments(X[:n], size, num_sub_batches=None if K == 1 else K)


def test_a_weight_that_may_change_by_itself_is_an_error():
    vcl = vk.VCL(weight=0.5)
    vcl(X)
    before = vcl.loss
    vcl.weight = 1.0
    vcl(X)
    torch.testing.assert_close(vcl.loss, 2 * before)
    vcl.weight = torch.tensor(1.0)
    with pytest.raises(TypeError, match=r"weight must be a float; got tensor\(1\.\)"):
        vcl(X)
    for name in ("weight", "beta_init", "beta_min"):
        with pytest.raises(TypeError, match=f"{name} must be a float"):
            vk.VCL(6, **{name: torch.tensor(0.1)})


FUNCTIONS = {
    "loss": vk.vcl_loss,
    "activation": vk.vcl_activation,
    "moments": lambda x: vk.sub_batch_moments(x, 5),
    "reference loss": vk.reference.vcl_loss,
    "reference activation": vk.reference.vcl_activation,
    "reference moments": lambda x: vk.reference.sub_batch_moments(x, 5),
    "VCL": lambda x: vk.VCL(6, **LEARNED)(x),
    "VCLActivation": lambda x: vk.VCLActivation("elu", 6, inject=True, **LEARNED)(x),
    "VCL of the first batch": lambda x: vk.VCL(**LEARNED)(x),
    "VCL with a running beta": lambda x: vk.VCL(beta_mode="running")(x),
    "VCL of a short batch": lambda x: vk.VCL(6, sub_batch_size=11)(x),
}
OF_BETA = [name for name in FUNCTIONS if "loss" in name or "activation" in name]


class NoTensor:
    """As numpy-like libraries have them."""

    @classmethod
    def __torch_function__(cls, *_, **__):
        return None


def nested(x, layout=torch.strided):
    return torch.nested.nested_tensor([x, x[: len(x) // 2]], layout=layout)


WRONG = {  # as x or beta, and what the error says of it
    "sparse": (lambda t: t.to_sparse(), "dense.*torch.sparse_coo"),
    "csr": (lambda t: t.view(-1, 2).to_sparse_csr(), "dense.*torch.sparse_csr"),
    "bsr": (lambda t: t.view(-1, 2).to_sparse_bsr((1, 2)), "dense.*torch.sparse_bsr"),
    "nested": (nested, "dense.*nested"),
    "jagged": (lambda t: nested(t, torch.jagged), "dense.*nested"),
    "mkldnn": (lambda t: t.to_mkldnn(), "dense.*torch._mkldnn"),
    "quantized": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "float.*torch.qint8"),
    "complex": (lambda t: t.to(torch.complex64), "float.*torch.complex64"),
    "integer": (lambda t: t.int(), "float.*torch.int32"),
    "bool": (lambda t: t > 0, "float.*torch.bool"),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), "float.*torch.float8_e4m3fn"),
    "without a shape": (lambda _: UninitializedParameter(), "a Tensor with a shape; got UninitializedParameter"),
    "numpy": (lambda t: t.numpy(), "Tensor; got ndarray"),
    "list": (lambda t: t.tolist(), "Tensor; got list"),
    "no tensor": (lambda _: NoTensor(), "Tensor; got NoTensor"),
}


WRONG_X = {
    **WRONG,
    "nothing": (lambda _: None, "Tensor; got NoneType"),
    "no dimension": (lambda _: torch.tensor(1.0), r"2 to 8 dimensions.*\(\)"),
    "one dimension": (lambda t: t[0], r"2 to 8 dimensions.*\(6,\)"),
}


@pytest.mark.parametrize("kind", WRONG_X)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_x_cannot_be(name, kind):
    make, message = WRONG_X[kind]
    with pytest.raises((TypeError, ValueError), match=f"x must (be|have) .*{message}"):
        FUNCTIONS[name](make(X[..., 0]))


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("name", OF_BETA)
def test_what_beta_cannot_be(name, kind):
    make, message = WRONG[kind]
    with pytest.raises((TypeError, ValueError), match=f"beta must be .*{message}"):
        FUNCTIONS[name](X, beta=make(torch.ones(6)))


@pytest.mark.parametrize("name", ["VCL", "VCLActivation", "VCL of the first batch"])
def test_a_meta_batch_and_a_beta_in_memory(name):
    with pytest.raises(ValueError, match="beta must be on x's device, meta; got cpu"):
        FUNCTIONS[name](X.to("meta"))
    with torch.device("meta"):
        vcl = vk.VCL(**LEARNED)
    vcl(X.to("meta"))
    assert (vcl.loss.device.type, vcl.beta.shape) == ("meta", (6,))


class Counted(torch.Tensor):
    """A subclass that sees the calls of functions."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


class Special(torch.nn.Parameter):
    pass


COMPLEX = torch.randn(20, 6, dtype=torch.complex64, generator=torch.Generator().manual_seed(1))
READ = {  # kinds of tensors that are read as any other, and a plain tensor of the same values
    "parameter": lambda: (torch.nn.Parameter(X.clone()), X),
    "subclass of a parameter": lambda: (Special(X.clone()), X),
    "subclass": lambda: (X.as_subclass(Counted), X),
    "negative bit": lambda: (COMPLEX.conj().imag, -COMPLEX.imag),
    "zeros without memory": lambda: (_efficientzerotensor((20, 6)), torch.zeros(20, 6)),
}


@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if "VCL" not in name])
def test_tensors_that_are_read_as_any(name, kind):
    x, plain = READ[kind]()
    found = [t.detach().as_subclass(torch.Tensor) for t in as_tuple(FUNCTIONS[name](x))]
    assert_all_close(found, as_tuple(FUNCTIONS[name](plain)))


def described(x, function):
    """Shape, strides and dtype of the results and of the gradient."""
    ones = [torch.ones_like(t) for t in as_tuple(function(x))]
    return [(t.shape, t.stride(), t.dtype) for t in results(function, x, ones)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("form", FORMS)
def test_meta_and_fake_tensors(form, unit, layout, dtype):
    x = torch.randn(20, 6, 3, 4).to(dtype).to(memory_format=layout)
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
        with FakeTensorMode():
            assert described(torch.empty_strided(x.shape, x.stride(), dtype=dtype), function) == wanted


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "was not built; install a C++20 compiler"), ("x", "_C.abi3.so cannot be loaded")],
)
def test_without_the_extension_the_reference_serves(monkeypatch, tmp_path, content, reason):
    path = tmp_path / "_C.abi3.so"
    path.write_text(content or "")
    monkeypatch.setattr(cpu, "_library_path", lambda: content and path)
    monkeypatch.setattr(cpu, "_reason", None)  # what load() sets, put back afterwards
    cpu.load()
    assert reason in vk.backends()["cpu"]
    with pytest.raises(RuntimeError, match=f"backend='cpu' cannot run: .*{reason[:12]}"):
        vk.vcl_loss(X, backend="cpu")
    assert torch.equal(vk.vcl_loss(X), vk.reference.vcl_loss(X))
    compiled = torch.compile(vk.vcl_loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X), vk.reference.vcl_loss(X))


def test_without_a_device_triton_says_so(monkeypatch):
    assert vk.backends() == {"cpu": "available", "triton": "available", "reference": "available"}
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="no CUDA or ROCm device"):
            vk.vcl_loss(X, backend="triton")


def test_command_line(capsys):
    from vcl_kernels.__main__ import main

    main()
    assert "cpu:       available" in capsys.readouterr().out
