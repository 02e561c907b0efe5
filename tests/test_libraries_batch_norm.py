"""remove_batch_norm on models of other libraries."""

import copy

import pytest
import torch
from libraries import NORMED
from normed import randomised

import vcl_kernels as vk

ROUNDINGS = 32  # of float32, of the largest output; a difference of folding, layer after layer


def output_of(net, inputs):
    output = net(**inputs) if isinstance(inputs, dict) else net(inputs)
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("shown", [False, True], ids=["traced", "shown"])
@pytest.mark.parametrize("name", NORMED)
def test_the_function_stays_and_trains(name, shown):
    case = NORMED[name]
    net, inputs = randomised(case.make()).eval(), case.inputs(2)
    plain = copy.deepcopy(net)
    with torch.no_grad():
        before = output_of(net, inputs)
    removal = vk.remove_batch_norm(net, inputs if shown else None)
    folded = sum(row.folded_into is not None for row in removal.rows)
    assert (len(removal.rows), folded) == (case.count, case.folded if shown else case.traced), f"{removal}"
    with torch.no_grad():
        moved = (output_of(net, inputs) - before).abs().max() / before.abs().max()
    assert moved <= ROUNDINGS * torch.finfo(torch.float32).eps

    added = set(net.state_dict()) - set(plain.state_dict())  # biases of layers that had none, and norms with none
    assert {key.rpartition(".")[2] for key in added} <= {"bias"}
    parameters = list(net.parameters())
    output_of(net.train(), inputs).sin().mean().backward()
    assert sum(p.grad is not None for p in parameters) > len(parameters) // 2
    torch.optim.SGD(net.parameters(), lr=0.01).step()
    assert output_of(net, inputs).isfinite().all()
