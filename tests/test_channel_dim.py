"""Activations whose channels are not in dimension 1: transformers' (N, L, C), and (N, H, W, C)."""

import pytest
import torch
from conftest import device_of
from torch import nn

import vcl_kernels as vk


class Encoder(nn.Module):
    """A convolution over patches, and a pre-norm feed-forward block on tokens."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.stem = nn.Conv2d(1, 6, 4, 4), nn.ReLU()
        self.norm, self.up, self.act, self.down = nn.LayerNorm(6), nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6)
        self.gate = nn.SiLU()
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        tokens = self.stem(self.patches(x)).flatten(2).transpose(1, 2)
        tokens = tokens + self.down(self.act(self.up(self.norm(tokens))))
        return self.head(self.gate(tokens.mean(1)))


X = torch.randn(20, 1, 12, 12)


@pytest.mark.parametrize("unit", ["channel", "activation"])
@pytest.mark.parametrize(("shape", "dim"), [((20, 7, 12), -1), ((20, 7, 12), 2), ((20, 3, 5, 12), -1), ((20, 12), -1)])
@pytest.mark.parametrize(
    ("activation", "form"), [("elu", "ratio"), ("gelu", "relative_variance"), ("identity", "ratio")]
)
def test_values_and_gradients_are_those_of_the_transposed(backend, unit, shape, dim, activation, form):
    device = device_of(backend)
    x, dy = torch.randn(shape, requires_grad=True, device=device), torch.randn(shape, device=device)
    first = x.detach().movedim(dim, 1).contiguous().requires_grad_()
    settings = {"sub_batch_size": 4, "form": form, "unit": unit, "backend": backend}
    ours = vk.VCLActivation(activation, channel_dim=dim, **settings)
    plain = vk.VCLActivation(activation, **settings)
    y, expected = ours(x), plain(first)
    assert y.is_contiguous()
    (ours.loss + (y * dy).sum()).backward()
    (plain.loss + (expected * dy.movedim(dim, 1)).sum()).backward()
    assert ours.beta.shape == plain.beta.shape == ((12,) if unit == "channel" else first.shape[1:])
    torch.testing.assert_close(y, expected.movedim(1, dim))
    torch.testing.assert_close(ours.loss, plain.loss)
    torch.testing.assert_close(x.grad, first.grad.movedim(1, dim))
    torch.testing.assert_close(ours.beta.grad, plain.beta.grad)


def test_nothing_is_copied(monkeypatch):
    x = torch.randn(20, 7, 12, requires_grad=True)
    act = vk.VCLActivation("relu", 12, channel_dim=-1)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda *_: pytest.fail("copied"))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = act(x)
    assert y.stride() == x.stride()
    assert y.untyped_storage().data_ptr() in {t.untyped_storage().data_ptr() for t in saved}


def test_identity_returns_its_input():
    vcl, x = vk.VCL(12, channel_dim=-1), torch.randn(20, 7, 12)
    assert vcl(x) is x
    torch.testing.assert_close(vcl.loss, vk.vcl_loss(x.transpose(1, 2), vcl.beta))


@pytest.mark.parametrize("inject", [True, False])
def test_attach_sees_what_comes_from_a_linear_layer(inject):
    net = Encoder()
    handle = vk.attach(net, X[:1], weight=0.5, inject=inject)
    assert [(name, tuple(beta.shape)) for name, beta in net.named_parameters() if "vcl" in name] == [
        ("stem.vcl.0.beta", (6,)),
        ("act.vcl.0.beta", (12,)),
        ("gate.vcl.0.beta", (6,)),
    ]
    seen = {}
    for name in ("stem", "act", "gate"):
        net.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0]}))
    net(X).sum().backward()
    seen["act"] = seen["act"].transpose(1, 2)
    assert seen["act"].shape == (20, 12, 9)
    for name, x in seen.items():
        torch.testing.assert_close(handle.losses[name], 0.5 * vk.vcl_loss(x, 1.0), check_dtype=False)
    assert (net.act.vcl[0].beta.grad is not None) == inject


def test_attach_is_told_a_dimension():
    net = nn.Sequential(nn.Conv1d(4, 8, 3), nn.ELU())
    handle = vk.attach(net, torch.randn(1, 4, 9), channel_dim=-1)
    assert [tuple(beta.shape) for beta in handle.parameters()] == [(7,)]
    handle.remove()
    net = nn.Sequential(nn.Linear(4, 8), nn.ELU())
    handle = vk.attach(net, torch.randn(1, 3, 4), channel_dim=1)
    assert [tuple(beta.shape) for beta in handle.parameters()] == [(3,)]
    handle.remove()
    handle = vk.attach(net, channel_dim=-1)
    net(torch.randn(10, 3, 4))
    assert [tuple(beta.shape) for beta in handle.parameters()] == [(8,)]


def test_monitor_looks_where_vcl_does():
    net = Encoder()
    handle = vk.attach(net, X[:1])
    with vk.VCLMonitor(handle) as monitor, vk.VCLMonitor(handle, channel_dim=1) as other:
        x = net.up(net.norm(net.stem(net.patches(X)).flatten(2).transpose(1, 2))).detach()
        net(X)
    found = {row["layer"]: row["variance"] for row in monitor.rows}
    _, var = vk.sub_batch_moments(x.transpose(1, 2), 5)
    assert found["act"] == pytest.approx(var.mean().item(), rel=1e-5)
    assert {row["layer"]: row["variance"] for row in other.rows}["act"] != found["act"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_in_one_graph():
    torch._dynamo.reset()
    act = vk.VCLActivation("gelu", 12, channel_dim=-1)
    x = torch.randn(20, 7, 12, requires_grad=True)

    def step(x):
        y = act(x)
        return y.sum() + act.loss

    step(x).backward()
    expected, x.grad = x.grad, None
    torch.compile(step, fullgraph=True, backend="aot_eager")(x).backward()
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("dim", [3, -3])
def test_a_dimension_that_x_has_not_is_an_error(dim):
    with pytest.raises(ValueError, match=r"channel_dim must be a dimension of x; got .* for shape \(20, 7, 12\)"):
        vk.VCLActivation("elu", channel_dim=dim)(torch.randn(20, 7, 12))


@pytest.mark.parametrize("make", [lambda dim: vk.VCL(channel_dim=dim), lambda dim: vk.VCLMonitor(Encoder(), channel_dim=dim), lambda dim: vk.attach(Encoder(), channel_dim=dim)])  # fmt: skip  # noqa: E501
def test_a_wrong_dimension_is_an_error_at_once(make):
    for wrong in ("last", 1.0, True):
        with pytest.raises(TypeError, match="channel_dim must be an int; got"):
            make(wrong)
    with pytest.raises(ValueError, match="channel_dim must not be 0, the dimension of samples"):
        make(0)


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_one_dimension_is_too_few(channel_dim):
    for act in (vk.VCL(channel_dim=channel_dim), vk.VCLActivation("elu", 4, channel_dim=channel_dim)):
        with pytest.raises(ValueError, match=r"x must have 2 to 8 dimensions.*\(20,\)"):
            act(torch.randn(20))


class Turned(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(6, 24), nn.SiLU(), nn.Linear(12, 6)

    def forward(self, x):
        gate, up = self.up(x).chunk(2, -1)
        return self.down(self.act(gate) * up)


class LowRank(nn.Module):
    """A sum of two linear layers, one of them scaled, as an adapter makes it."""

    def __init__(self):
        super().__init__()
        self.whole, self.down, self.up, self.act = nn.Linear(6, 12), nn.Linear(6, 2), nn.Linear(2, 12), nn.GELU()

    def forward(self, x):
        return self.act(self.whole(x) + 0.5 * self.up(self.down(x)))


class Flat(nn.Module):
    """A linear layer over all tokens at once, written with its matrix, as GPT-2's are."""

    def __init__(self):
        super().__init__()
        self.matrix, self.bias, self.act = nn.Parameter(torch.randn(6, 12)), nn.Parameter(torch.zeros(12)), nn.GELU()

    def forward(self, x):
        return self.act(torch.addmm(self.bias, x.flatten(0, 1), self.matrix).unflatten(0, x.shape[:2]))


class Residual(nn.Module):
    """The sum of a convolution's turned output and a linear layer's, in the memory order of the first."""

    def __init__(self):
        super().__init__()
        self.convolution, self.linear, self.act = nn.Conv1d(9, 9, 1), nn.Linear(9, 9), nn.GELU()

    def forward(self, x):
        tokens = self.convolution(x.transpose(1, 2)).transpose(1, 2)
        return self.act(tokens + self.linear(tokens))


class Gate(nn.Module):
    """A gate for each channel of an image, from a linear layer."""

    def __init__(self):
        super().__init__()
        self.linear, self.act = nn.Linear(6, 6), nn.Sigmoid()

    def forward(self, x):
        return x * self.act(self.linear(x.mean((2, 3)))[:, :, None, None])


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.act = nn.Linear(8, 8), nn.GELU()

    def forward(self, x):
        return self.act(self.tokens(x).transpose(1, 2))


IMAGES, TOKENS = torch.randn(2, 6, 4, 8), torch.randn(2, 9, 6)


@pytest.mark.parametrize(
    ("model", "example", "options", "units"),
    [
        (nn.Sequential(nn.Linear(6, 12), nn.Dropout(), nn.GELU()), TOKENS, {}, 12),
        (nn.Sequential(nn.RMSNorm(6), nn.GELU()), TOKENS, {}, 6),
        (nn.Sequential(nn.LayerNorm([6, 4, 8]), nn.ReLU()), IMAGES, {}, 6),
        (nn.Sequential(Turned(6), nn.ReLU()), IMAGES, {}, 6),
        (Gated(), TOKENS, {}, 12),
        (LowRank(), TOKENS, {}, 12),
        (Flat(), TOKENS, {}, 12),
        (Residual(), torch.randn(2, 4, 9), {}, 9),
        (nn.Sequential(nn.Linear(6, 60), nn.Unflatten(1, (12, 5, 1)), nn.ReLU()), torch.randn(2, 6), {}, 12),
        (nn.Sequential(nn.Linear(6, 60), nn.Unflatten(2, (4, 15)), nn.Tanh()), TOKENS, {}, 9),
        (nn.Sequential(nn.Linear(9, 9), nn.Conv1d(6, 6, 1), nn.ReLU()), torch.randn(2, 6, 9), {}, 6),
        (Gate(), IMAGES, {}, 6),
        (torch.compile(nn.Sequential(nn.Linear(6, 12), nn.GELU()), backend="eager"), TOKENS, {}, 12),
        (Transposed(), torch.randn(2, 6, 8), {}, 8),
        (nn.Sequential(nn.Identity(), nn.Linear(6, 3)), TOKENS, {"layers": ["1"]}, 6),
        (nn.Sequential(nn.Linear(6, 12), nn.GELU()), torch.randn(2, 6), {}, 12),
    ],
    ids=[
        "dropout",
        "rms norm",
        "norm of images",
        "norm that turns",
        "gated",
        "low rank",
        "flat",
        "residual",
        "image",
        "heads",
        "convolution",
        "gate",
        "compiled",
        "transposed",
        "layers",
        "2-D",
    ],
)
def test_the_example_shows_where_features_are_last(model, example, options, units):
    handle = vk.attach(model, example, **options)
    assert [tuple(beta.shape) for beta in handle.parameters()] == [(units,)]
    (vcl,) = (module for module in model.modules() if isinstance(module, vk.VCLActivation))
    assert ("channel_dim=-1" in repr(model)) == (vcl.channel_dim == -1)
