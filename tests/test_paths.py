"""Every way on which a forward runs: transforms, checkpoints with pauses, recursion, distributed training."""

import pytest
import torch
from common import LEARNED
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import vcl_kernels as vk

pytestmark = pytest.mark.usefixtures("one_thread")


def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.ELU(), nn.Linear(8, 8), nn.Mish(), nn.Linear(8, 2))


def attached(net, **options):
    return net, vk.attach(net, torch.randn(20, 4), weight=1.0, **LEARNED, **options)


@pytest.mark.parametrize("inject", [True, False])
def test_batched_by_vmap(inject):
    net, handle = attached(mlp(), inject=inject)
    x, gradients = torch.randn(3, 20, 4), []

    def objective(x):
        y = net(x).square().mean()
        return y if inject else y + handle.loss()

    for run in (lambda: torch.func.vmap(objective)(x).sum(), lambda: sum(map(objective, x))):
        gradients.append(torch.autograd.grad(run(), list(net.parameters())))
    torch.testing.assert_close(*gradients)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit.script, in torch's forward mode
def test_forward_mode():
    net, handle = attached(mlp())
    net.double()
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    x = torch.randn(20, 4, dtype=torch.float64)

    def objective(parameters):
        return torch.func.functional_call(net, parameters, (x,)).square().mean() + handle.loss()

    _, tangent = torch.func.jvp(objective, (parameters,), (tangents,))
    gradients = torch.func.grad(objective)(parameters)
    torch.testing.assert_close(tangent, sum((gradients[name] * tangents[name]).sum() for name in parameters))


class Checkpointed(nn.Module):
    """Its second part is run again in backward: "new", or reentrant as in "old"."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second, self.kind = nn.Linear(4, 8), nn.Sequential(nn.ELU(), nn.Linear(8, 2)), kind

    def forward(self, x):
        x = self.first(x)
        return self.second(x) if self.kind is None else checkpoint(self.second, x, use_reentrant=self.kind == "old")


def gradients_of(steps, kind=None, whole=None, **options):
    """Gradients of a list of backward passes, each over a list of forwards: "vcl", "paused", "no_grad"."""
    net, handle = attached(Checkpointed(kind), **options)
    x = torch.linspace(-1, 2, 80).view(20, 4).requires_grad_()
    run = net if whole is None else lambda x: checkpoint(net, x, use_reentrant=whole == "old")
    for step in steps:
        objective = 0
        for mode in step:
            if mode == "paused":
                with handle.paused():
                    objective = objective + run(x).mean()
            elif mode == "no_grad":
                torch.no_grad()(net)(x)
            else:
                objective = objective + run(x).mean() + (0 if options.get("inject") else handle.loss())
        objective.backward()
    return [p.grad for p in net.parameters()]


APART = [["vcl"], ["paused"], ["vcl"]], [["paused"], ["vcl", "no_grad"]], [["paused"]], [["vcl", "vcl"]]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # under no_grad
@pytest.mark.parametrize("steps", APART, ids=str)
@pytest.mark.parametrize(("kind", "inject"), [("new", True), ("new", False), ("old", True)])
def test_a_recomputation_does_what_its_forward_did(kind, inject, steps):
    torch.testing.assert_close(gradients_of(steps, kind, inject=inject), gradients_of(steps, inject=inject))


def test_a_frozen_part_is_recomputed_without_vcl():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.part, self.rest = nn.Sequential(nn.ELU(), nn.Linear(4, 8)), nn.Sequential(nn.Tanh(), nn.Linear(8, 2))

        def forward(self, x):
            return self.rest(checkpoint(self.part, x, use_reentrant=False))

    net, handle = attached(Net())
    objective = net(torch.randn(20, 4)).sum() + handle.loss()
    objective.backward()
    assert list(handle.losses) == ["rest.0"]
    assert [beta.grad is None for beta in handle.parameters()] == [True, False]


@pytest.mark.parametrize("steps", APART[:3], ids=str)
@pytest.mark.parametrize("whole", ["new", "old"])
def test_a_recomputation_of_the_model_does_what_its_forward_did(whole, steps):
    steps = [[mode for mode in step if mode != "no_grad"] for step in steps]
    torch.testing.assert_close(gradients_of(steps, whole=whole, inject=True), gradients_of(steps, inject=True))


@pytest.mark.parametrize("steps", [[["vcl", "paused"]], [["paused", "vcl"]]], ids=str)
@pytest.mark.parametrize("kind", ["new", "old"])
def test_a_recomputation_of_an_unknown_forward_is_an_error(kind, steps):
    with pytest.raises(RuntimeError, match="with and without handle.paused.*Call backward for each before"):
        gradients_of(steps, kind, inject=True)


def test_a_step_ends_what_may_be_run_again():
    net, handle = attached(Checkpointed("new"))
    optimizer, x = torch.optim.SGD(net.parameters(), 0.1), torch.randn(20, 4)
    with handle.paused():
        net.kind = None  # without a checkpoint, nothing is run again
        net(x).sum().backward()
    optimizer.step()
    net.kind = "new"
    (net(x).sum() + handle.loss()).backward()
    assert all(beta.grad.abs().sum() > 0 for beta in handle.parameters())


@pytest.mark.parametrize("inject", [True, False])
def test_a_call_without_a_gradient_beside_one_under_checkpointing(inject):
    class Siamese(nn.Module):
        def __init__(self, checkpoints):
            super().__init__()
            torch.manual_seed(1)
            self.encoder, self.checkpoints = nn.Sequential(nn.Linear(4, 8), nn.ELU(), nn.Linear(8, 4)), checkpoints

        def forward(self, x):
            z = checkpoint(self.encoder, x, use_reentrant=False) if self.checkpoints else self.encoder(x)
            with torch.no_grad():
                target = self.encoder(x + 1)
            return (z - target).square().mean()

    gradients, x = [], torch.randn(20, 4)
    for checkpoints in (True, False):
        net, handle = attached(Siamese(checkpoints), inject=inject, shared_beta=True)
        (net(x) + (0 if inject else handle.loss())).backward()
        gradients.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(*gradients)


def test_an_optimizers_step_after_vmap():
    net, handle = attached(mlp(), inject=True)
    optimizer, x = torch.optim.SGD(net.parameters(), 0.1), torch.randn(3, 20, 4)
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def objective(parameters, x):
        return torch.func.functional_call(net, parameters, (x,)).mean()

    torch.func.vmap(torch.func.grad(objective), (None, 0))(parameters, x)
    optimizer.step()
    net(x[0]).mean().backward()
    assert all(beta.grad.abs().sum() > 0 for beta in handle.parameters())


class Recursive(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.act = nn.Linear(4, 4), nn.Tanh()

    def forward(self, x, depth=2):
        if isinstance(x, list):
            return [self(one) for one in x]
        x = self.act(self.linear(x))
        return x if depth == 0 else self(x, depth - 1)


def test_a_forward_that_calls_itself():
    x = torch.randn(20, 4)
    net, handle = attached(Recursive())
    net(x)
    losses = handle.losses
    assert list(losses) == ["act", "act:1", "act:2"]
    with torch.no_grad():
        pre = net.linear(x)
        torch.testing.assert_close(losses["act"], vk.vcl_loss(pre, 1.0))
    handle.remove()
    handle = vk.attach(net, ([x, x],))
    net([x, x])
    assert len(handle.losses) == 6
    net(x)  # the next forward begins anew
    assert len(handle.losses) == 3


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("inject", [True, False])
@pytest.mark.parametrize("case", ["plain", "frozen", "paused", "input"])
def test_distributed_training_finds_a_gradient_of_each_beta(case, inject):
    """DistributedDataParallel raises in the second step if one was missing in the first."""
    net = nn.Sequential(nn.Tanh(), *mlp()) if case == "input" else mlp()
    net[1 if case == "input" else 0].requires_grad_(case != "frozen")
    net, handle = attached(net, inject=inject)
    wrapped, x = DistributedDataParallel(net), torch.randn(20, 4)
    for _ in range(3):
        net.zero_grad()
        if case == "paused":
            with handle.paused():
                wrapped(x).mean().backward()
            assert all(torch.equal(beta.grad, torch.zeros_like(beta)) for beta in handle.parameters())
        y = wrapped(x).mean()
        (y if inject else y + handle.loss()).backward()
    moves = [bool(beta.grad.abs().sum() > 0) for beta in handle.parameters()]
    assert moves == {"frozen": [False, True], "input": [False, True, True]}.get(case, [True, True])


@pytest.mark.usefixtures("one_process")
def test_outputs_of_every_kind_take_betas_without_a_gradient():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return {"n": 3, "both": (x, x.long(), self.net(x))}

    net, handle = attached(Net())
    wrapped, x = DistributedDataParallel(net), torch.randn(20, 4)
    for _ in range(2):
        with handle.paused():
            output = wrapped(x)
        output["both"][2].mul_(2).sum().backward()
        assert output["n"] == 3
        assert not output["both"][0].requires_grad
        assert all(torch.equal(beta.grad, torch.zeros_like(beta)) for beta in handle.parameters())
