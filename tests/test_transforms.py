"""Transforms of torch.func and forward mode, which the reference has and kernels refuse, eager and compiled."""

import copy

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from common import LEARNED, results
from conftest import device_of
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import vcl_kernels as vk
from vcl_kernels.options import FORMS, UNITS

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # forward mode of eager PyTorch itself
]


def loss(x, **options):
    return vk.vcl_loss(x, sub_batch_size=3, **options)


def activation(x, **options):
    y, loss = vk.vcl_activation(x, "elu", sub_batch_size=3, **options)
    return y.square().sum() + loss


def moments(x, **options):
    mean, var = vk.sub_batch_moments(x, 3, **options)
    return mean.sum() + var.square().sum()


def module(x):
    return VCL(x).square().sum() + VCL.loss


VCL = vk.VCLActivation("elu", 3, sub_batch_size=3, beta_init=5e-4, **LEARNED).double()
FUNCTIONS = {"loss": loss, "activation": activation, "moments": moments}
X = torch.randn(3, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))  # an ensemble
T = torch.randn(3, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def backward(function, x):
    """The gradient as autograd has it, from the kernels."""
    return results(function, x)[1]


def each_backward(function):
    return torch.stack([backward(function, x) for x in X])


def slope(function, x, direction):
    with fwAD.dual_level():
        return fwAD.unpack_dual(function(fwAD.make_dual(x, direction))).tangent


TRANSFORMS = {  # what is asked for, and what it is in plain autograd
    "grad": (lambda f: grad(f)(X[0]), lambda f: backward(f, X[0])),
    "vjp": (lambda f: vjp(f, X[0])[1](X.new_tensor(2.0))[0], lambda f: 2 * backward(f, X[0])),
    "vmap": (lambda f: vmap(f)(X), lambda f: torch.stack([f(x) for x in X])),
    "jvp": (lambda f: jvp(f, (X[0],), (T[0],))[1], lambda f: (backward(f, X[0]) * T[0]).sum()),
    "dual numbers": (lambda f: slope(f, X[0], T[0]), lambda f: (backward(f, X[0]) * T[0]).sum()),
    "jacfwd": (lambda f: jacfwd(f)(X[0]), lambda f: backward(f, X[0])),
    "vmap of grad": (lambda f: vmap(grad(f))(X), each_backward),
    "grad of vmap": (lambda f: grad(lambda xs: vmap(f)(xs).sum())(X), each_backward),
    "vmap of jvp": (
        lambda f: vmap(lambda t: jvp(f, (X[0],), (t,))[1])(T),
        lambda f: (backward(f, X[0]) * T).sum((1, 2)),
    ),
    "hessian": (lambda f: hessian(f)(X[0]), lambda f: torch.autograd.functional.hessian(f, X[0])),
    "jacrev of jacrev": (lambda f: jacrev(jacrev(f))(X[0]), lambda f: torch.autograd.functional.hessian(f, X[0])),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    ("name", "compiled"), [*((name, compiled) for name in FUNCTIONS for compiled in (False, True)), ("module", False)]
)
def test_transforms(name, compiled, transform):
    ask, plain = TRANSFORMS[transform]
    function = FUNCTIONS.get(name, module)
    run = torch.compile(ask, fullgraph=True, backend="aot_eager") if compiled else ask
    torch.testing.assert_close(run(function), plain(function))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["loss", "activation"])
def test_every_form_and_unit(name, form, unit):
    def function(x):
        return FUNCTIONS[name](x, form=form, unit=unit)

    for ask, plain in (TRANSFORMS[t] for t in ("vmap of grad", "jvp", "hessian")):
        torch.testing.assert_close(ask(function), plain(function))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_named_backend_refuses(kernel_backend, name, transform):
    """Where Dynamo meets the error it leaves the function to eager code, which raises it."""
    if device_of(kernel_backend) != "cpu":
        pytest.skip("the tensors are on the CPU")

    def ask():
        return TRANSFORMS[transform][0](lambda x: FUNCTIONS[name](x, backend=kernel_backend))

    runs = [ask]
    if kernel_backend == "cpu" and name == "loss" and transform in ("grad", "vmap", "jvp"):
        runs += [torch.compile(ask, backend="aot_eager", fullgraph=whole) for whole in (False, True)]
    for run in runs:
        with pytest.raises(RuntimeError, match=f"backend='{kernel_backend}' has no torch.func transforms"):
            run()


def test_a_compiled_module_in_a_transform_says_what_to_do():
    def ask(x):
        return grad(module)(x)

    with pytest.raises(RuntimeError, match="cannot be compiled inside a torch.func transform"):
        torch.compile(ask, backend="aot_eager", fullgraph=True)(X[0])
    found = torch.compile(ask, backend="aot_eager")(X[0])  # in eager code
    torch.testing.assert_close(found, backward(module, X[0]))


def of_beta(vcl, x):
    def function(beta):
        y = functional_call(vcl, {"beta": beta}, (x,))
        return y.square().sum() + (0 if vcl.inject else vcl.loss)

    return function


@pytest.mark.parametrize("inject", [False, True])
@pytest.mark.parametrize("name", ["elu", "identity"])
def test_the_gradient_of_a_modules_beta(name, inject):
    """Above its minimum, and below, where it may only rise."""
    vcl = vk.VCLActivation(name, 3, sub_batch_size=3, inject=inject, beta_min=0.1, **LEARNED).double()
    betas = torch.tensor([[1e-3, 2e-3, 0.5], [0.5, 0.6, 1e-3]], dtype=torch.float64)
    wanted = torch.stack([backward(of_beta(vcl, x), beta) for beta, x in zip(betas, X, strict=False)])
    assert (wanted == 0).any()
    assert (wanted != 0).any()
    for beta, x, one in zip(betas, X, wanted, strict=False):
        torch.testing.assert_close(grad(of_beta(vcl, x))(beta), one)
    each = vmap(lambda beta, x: grad(of_beta(vcl, x))(beta))(betas, X[:2])
    torch.testing.assert_close(each, wanted)
    of_all = grad(lambda betas: vmap(lambda beta, x: of_beta(vcl, x)(beta))(betas, X[:2]).sum())(betas)
    torch.testing.assert_close(of_all, wanted)


def test_forward_mode_of_beta():
    """Of a tensor; of a module's, which below its minimum does not act, and whose injected loss has no forward mode."""
    beta, direction = torch.tensor([[0.5, 1.0, 2.0], [1.0, -2.0, 3.0]]).double()
    found = slope(lambda b: loss(X[0], beta=b), beta, direction)
    torch.testing.assert_close(found, (backward(lambda b: loss(X[0], beta=b), beta) * direction).sum())
    vcl = vk.VCLActivation("elu", 3, sub_batch_size=3, beta_min=0.7, **LEARNED).double()
    of_each = jacfwd(of_beta(vcl, X[0]))(beta)
    assert of_each[0] == 0
    torch.testing.assert_close(of_each[1:], backward(of_beta(vcl, X[0]), beta)[1:])
    vcl.inject = True
    with pytest.raises(NotImplementedError, match="jvp"):
        jacfwd(of_beta(vcl, X[0]))(beta)


def test_an_ensemble_of_networks():
    nets = [
        torch.nn.Sequential(
            torch.nn.Linear(3, 4), vk.VCLActivation("elu", 4, sub_batch_size=3, **LEARNED), torch.nn.Linear(4, 1)
        )
        for _ in range(3)
    ]
    nets = [net.double() for net in nets]
    one = copy.deepcopy(nets[0])
    parameters, _ = stack_module_state(nets)

    def objective(parameters, x):
        return functional_call(one, parameters, (x,)).square().mean() + one[1].loss

    found = vmap(grad(objective))(parameters, X)
    for k, net in enumerate(nets):
        (net(X[k]).square().mean() + net[1].loss).backward()
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(found[name][k], parameter.grad)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_compiled_function_in_a_dual_level(name):
    """A compiler that makes code of its own loses tangents here, of PyTorch's functions too."""
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, backend="aot_eager")
    compiled(X[0])
    torch.testing.assert_close(slope(compiled, X[0], T[0]), TRANSFORMS["dual numbers"][1](FUNCTIONS[name]))
