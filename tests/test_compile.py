"""Compiled and exported code agrees with eager code: where eager code raises, compiled code raises or is right."""

import re

import pytest
import torch
from common import LAYOUTS, LEARNED, as_tuple, assert_all_close
from torch._inductor import config
from torch._inductor.utils import run_and_get_code
from torch.export import Dim, export

import vcl_kernels as vk
from vcl_kernels.options import UNITS

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning",
        "ignore::FutureWarning",
        "ignore:dynamo_pgo force disabled",
        "ignore:While compiling, we found certain side effects",  # a module keeps its loss
    ),
]


def test_inductor_gives_convolutions_the_layout_that_it_likes():
    """And VCL takes it as it is: eager convolutions are contiguous here, Inductor's channels_last."""
    conv, x = torch.nn.Conv2d(4, 32, 3), torch.randn(20, 4, 10, 10)
    betas = [(torch.rand(units) + 0.5).requires_grad_() for units in (32, (32, 8, 8))]
    wanted = [*conv.parameters(), *betas]

    def step():
        z, options = conv(x), {"form": "relative_variance", "sub_batch_size": 4}
        found = [vk.vcl_activation(z, "elu", b, unit=unit, **options) for b, unit in zip(betas, UNITS, strict=True)]
        return sum(y.sum() + loss for y, loss in found)  # little else for Inductor to compile

    with config.patch(force_disable_caches=True):
        loss, codes = run_and_get_code(torch.compile(step, fullgraph=True))
    (convolved,) = re.findall(r"(\w+) = extern_kernels.convolution\(", codes[0])
    assert re.search(rf"assert_size_stride\({convolved}, \(20, 32, 8, 8\), \(2048, 1, 256, 32\)", codes[0])
    assert codes[0].count(f"vcl_kernels.activation.default({convolved},") == 2
    assert_all_close(*(torch.autograd.grad(t, wanted) for t in (loss, step())), rtol=1e-4, atol=1e-5)


def after(call, of, dtype=torch.float32):
    """Call ``call(x, beta)``, change one of its tensors x, y or beta, and use them all."""

    def function(x, beta, by, in_place):
        tensors = {"x": (x * 1.0).to(dtype), "beta": beta * 1.0}
        *y, loss = call(tensors["x"], tensors["beta"])
        tensors.update(y=y[0]) if y else None
        by = by[0] if of == "beta" else by
        tensors[of] = tensors[of].add_(by) if in_place else tensors[of] + by
        return sum(t.float().square().sum() for t in tensors.values()) + loss

    return function


def of_activation(name, **options):
    return lambda x, beta: vk.vcl_activation(x, name, beta, **options)


def of_loss(**options):
    return lambda x, beta: [vk.vcl_loss(x, beta, **options)]


def of_moments(x, _):
    mean, var = vk.sub_batch_moments(x, 4)
    return [mean.sum() + var.square().sum()]


def of_module(name, inject):
    module = vk.VCLActivation(name, 8, inject=inject, weight=0.5, **LEARNED)

    def call(x, _):
        y = module(x)
        return y, 0 if inject else module.loss

    return call


EVERY = {"form": "relative_variance", "sub_batch_size": 3}
CHANGES = {
    **{f"y of {name}": after(of_activation(name), "y") for name in ("relu", "leaky_relu", "elu", "tanh")},
    **{f"free y of {name}": after(of_activation(name), "y") for name in ("gelu", "silu")},
    **{f"x of {name}": after(of_activation(name), "x") for name in ("relu", "elu", "gelu", "silu")},
    "x of elu of all rows": after(of_activation("elu", **EVERY), "x"),
    "beta of elu": after(of_activation("elu"), "beta"),
    "beta of gelu": after(of_activation("gelu", **EVERY), "beta"),
    "x of loss": after(of_loss(), "x"),
    "x of float16 loss": after(of_loss(), "x", torch.float16),
    "x of loss of all rows": after(of_loss(**EVERY), "x"),
    "beta of loss": after(of_loss(), "beta"),
    "beta of the reference": after(of_loss(backend="reference"), "beta"),
    "x of moments": after(of_moments, "x"),
    **{f"{of} of module, inject={i}": after(of_module("elu", i), of) for of in "xy" for i in (False, True)},
    **{f"free y of {n} module, {i}": after(of_module(n, i), "y") for n in ("gelu", "silu") for i in (False, True)},
}


@pytest.mark.parametrize("rows", [11, 20, 40])  # one pair is nearly all of them, half, a quarter
@pytest.mark.parametrize("change", CHANGES)
def test_what_backward_reads_is_changed_in_place(change, rows):
    """Never a gradient from values that were overwritten; what backward does not read is free to change."""
    function, values = CHANGES[change], [torch.randn(rows, 8), torch.rand(8) + 0.5]
    by = torch.randn(rows, 8)

    def gradients(run, in_place):
        inputs = [t.clone().requires_grad_() for t in values]
        return torch.autograd.grad(run(*inputs, by, in_place), inputs)

    wanted, refused = gradients(function, False), []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        try:
            found = gradients(run, True)
        except RuntimeError as error:
            refused.append(str(error))
        else:
            assert_all_close(found, wanted)
    assert all("inplace" in message for message in refused)
    assert not (change.startswith("free") and refused)


def test_a_changed_output_of_a_compiled_activation_is_an_error():
    """As in eager code, and with the compiler that users have."""

    def step(x, by):
        y, loss = vk.vcl_activation(x * 1.0, "elu")
        y += by
        return y.square().sum() + loss

    x = torch.randn(20, 8, requires_grad=True)
    for run in (step, torch.compile(step)):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            run(x, torch.randn(20, 8)).backward()


class Net(torch.nn.Module):
    """A parameter before the function, so that a gradient is wanted."""

    def __init__(self, function, **options):
        super().__init__()
        self.function, self.options = function, options
        self.weight = torch.nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.function(x * self.weight, **self.options)


class Inference(Net):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class Layer(torch.nn.Module):
    def __init__(self, form, unit, **options):
        super().__init__()
        options |= {"form": form, "unit": unit, "beta_mode": "fixed" if form == "variance" else "learned"}
        self.conv = torch.nn.Conv2d(3, 5, 1)
        self.vcl = vk.VCLActivation("elu", 5 if unit == "channel" else (5, 4, 4), **options)

    def forward(self, x):
        return self.vcl(self.conv(x)), self.vcl.loss


FUNCTIONS = {
    "loss": vk.vcl_loss,
    "activation": vk.vcl_activation,
    "gelu": lambda x, **options: vk.vcl_activation(x, "gelu", **options),
    "moments": lambda x, unit="channel", **_: vk.sub_batch_moments(x, 5, unit=unit),
}
NETS = {
    **{name: lambda f=f, **options: Net(f, **options) for name, f in FUNCTIONS.items()},
    **{f"{name} without grad": lambda f=f, **options: Inference(f, **options) for name, f in FUNCTIONS.items()},
    "layer": Layer,
    "injected": lambda **options: Layer(inject=True, **options),
}


def outputs_and_gradients(net, x):
    found = as_tuple(net(x))
    if not any(t.requires_grad for t in found):
        return found
    return [*found, *torch.autograd.grad(sum(t.square().sum() for t in found), list(net.parameters()))]


BATCH = {"dynamic_shapes": ({0: Dim("batch", min=10, max=512)},)}
WAYS = {
    "compiled": lambda net, _: torch.compile(net, fullgraph=True, backend="aot_eager"),
    "dynamic": lambda net, _: torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=True),
    "exported": lambda net, x: export(net, (x,), **BATCH).module(),
    "strict": lambda net, x: export(net, (x,), strict=True, **BATCH).module(),
}
CASES = [
    *((way, "ratio", "channel", "channels_last") for way in WAYS),
    *((way, "relative_variance", "activation", "contiguous") for way in WAYS),
    ("exported", "ratio", "activation", "contiguous"),
    ("exported", "variance", "channel", "contiguous"),
    ("exported", "variance", "activation", "channels_last"),
    ("exported", "relative_variance", "channel", "contiguous"),
]


@pytest.mark.parametrize(
    ("name", "way", "form", "unit", "layout"),
    [(name, *case) for name in NETS for case in (CASES[:4] if "without" in name else CASES)],
)
def test_batches_of_any_size(name, way, form, unit, layout):
    net = NETS[name](form=form, unit=unit)
    program = WAYS[way](net, LAYOUTS[layout](torch.randn(25, 3, 4, 4)))
    for rows in (10, 20, 37, 512):
        x = LAYOUTS[layout](torch.randn(rows, 3, 4, 4))
        found, wanted = outputs_and_gradients(program, x), outputs_and_gradients(net, x)
        assert [t.requires_grad for t in found] == [t.requires_grad for t in wanted]
        assert_all_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_exported_program_is_decomposed_to_kernels(name):
    """For inference, as ahead-of-time compilers want it."""
    net = Net(FUNCTIONS[name], form="variance")
    program = export(net, (torch.randn(25, 3),), **BATCH)
    program = program.run_decompositions()
    ops = {str(node.target) for node in program.graph.nodes if "vcl" in str(node.target)}
    assert ops == {f"vcl_kernels.{'activation' if name == 'gelu' else name}.default"}
    x = torch.randn(37, 3)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), net(x))
