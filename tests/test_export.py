"""torch.export with a batch of any size: values and gradients of the exported program."""

import pytest
import torch
from common import LAYOUTS
from conftest import FORMS, UNITS
from torch.export import Dim, export

import vcl_kernels as vk

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:While compiling, we found certain side effects",  # a module keeps its loss
)


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
    def __init__(self, unit="channel", **options):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 5, 1)
        self.vcl = vk.VCLActivation("elu", 5 if unit == "channel" else (5, 4, 4), unit=unit, **options)

    def forward(self, x):
        y = self.vcl(self.conv(x))
        return y, self.vcl.loss


def moments(x, form="ratio", **options):
    return vk.sub_batch_moments(x, 5, **options)


def gelu(x, **options):
    return vk.vcl_activation(x, "gelu", **options)


FUNCTIONS = {"loss": vk.vcl_loss, "activation": vk.vcl_activation, "gelu": gelu, "moments": moments}
NETS = {
    **{name: lambda f=f, **options: Net(f, **options) for name, f in FUNCTIONS.items()},
    **{f"{name} without grad": lambda f=f, **options: Inference(f, **options) for name, f in FUNCTIONS.items()},
    "layer": Layer,
    "injected": lambda **options: Layer(inject=True, **options),
}


def all_of(net, x):
    """What the network returns, and the gradients of a sum of it."""
    results = net(x)
    results = [results] if isinstance(results, torch.Tensor) else list(results)
    if not any(t.requires_grad for t in results):
        return results
    return [*results, *torch.autograd.grad(sum(t.square().sum() for t in results), list(net.parameters()))]


def check(net, layout="contiguous", strict=False):
    batch = Dim("batch", min=10, max=512)
    x = LAYOUTS[layout](torch.randn(25, 3, 4, 4))
    program = export(net, (x,), dynamic_shapes=({0: batch},), strict=strict).module()
    for rows in (10, 37, 512):
        x = LAYOUTS[layout](torch.randn(rows, 3, 4, 4))
        found, wanted = all_of(program, x), all_of(net, x)
        assert [t.requires_grad for t in found] == [t.requires_grad for t in wanted]
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NETS)
def test_every_form_and_unit(name, form, unit):
    if "moments" in name and form != "ratio":
        pytest.skip("moments have no form")
    check(NETS[name](form=form, unit=unit))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", NETS)
def test_layouts_and_strict(name, layout, strict):
    for form in ("ratio", "variance") if "moments" not in name else ("ratio",):
        check(NETS[name](form=form), layout, strict)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_exported_program_is_decomposed_to_kernels(name):
    """For inference, as ahead-of-time compilers want it."""
    net = Net(FUNCTIONS[name], form="variance")
    program = export(net, (torch.randn(25, 3),), dynamic_shapes=({0: Dim("batch", min=10, max=512)},))
    program = program.run_decompositions()
    ops = {str(node.target) for node in program.graph.nodes if "vcl" in str(node.target)}
    assert ops == {f"vcl_kernels.{'activation' if name == 'gelu' else name}.default"}
    x = torch.randn(37, 3)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), net(x))
