"""What attach finds to doubt: models that are wrapped already, missing kernels, rows that are no samples."""

from functools import partial

import pytest
import torch
from common import LEARNED
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import vcl_kernels as vk
from vcl_kernels.backends import cpu


def network():
    return nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ELU()), nn.Linear(8, 2))


@pytest.mark.usefixtures("one_process")
def test_a_model_inside_a_distributed_one_is_refused():
    wrapped, sharded = DistributedDataParallel(network()), network()
    torch.distributed.fsdp.fully_shard(sharded, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    for model in (wrapped, wrapped.module, wrapped.module[0], sharded, sharded[0]):
        with pytest.raises(ValueError, match="DistributedDataParallel|FSDPModule.*[Ww]rap it afterwards"):
            vk.attach(model, beta_mode="learned")
    assert not list(vk.attach(wrapped.module).parameters())
    net, x = network(), torch.randn(20, 4)
    handle = vk.attach(net, x, **LEARNED)
    (DistributedDataParallel(net)(x).sum() + handle.loss()).backward()
    assert all(beta.grad.abs().sum() > 0 for beta in handle.parameters())


class Detector(nn.Module):
    """Takes a list of images, as detection models do."""

    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3), nn.ReLU()

    def forward(self, images):
        return self.act(self.conv(torch.stack(images)))


def test_a_list_of_images_is_a_batch():
    handle = vk.attach(Detector(), ([torch.randn(3, 8, 8), torch.randn(3, 8, 8)],))
    assert list(handle.layers) == ["act"]


def test_a_missing_native_backend_is_told(monkeypatch):
    monkeypatch.setattr(cpu, "reason", lambda: "no compiler was found")
    with pytest.warns(vk.VCLWarning, match="reference.*'cpu' kernels cannot run: no compiler.*backend='reference'"):
        vk.attach(network(), torch.randn(20, 4))
    vk.attach(network(), torch.randn(20, 4), backend="reference")


class Reshaped(nn.Module):
    """Gives its activation another dimension 0."""

    def __init__(self, reshape):
        super().__init__()
        self.reshape, self.linear, self.act = reshape, nn.Linear(8, 8), nn.ELU()

    def forward(self, x):
        return self.act(self.reshape(self.linear(x)))


def encoder_layer(**options):
    return nn.TransformerEncoderLayer(8, 2, 16, activation=nn.GELU(), **options)


@pytest.mark.parametrize(
    ("make", "length", "why"),
    [
        (encoder_layer, 6, r"shape \(6, 4, 16\), inside a module with batch_first=False"),
        (encoder_layer, 8, r"shape \(8, 4, 16\), inside a module with batch_first=False"),
        (partial(Reshaped, lambda x: x[None]), 6, r"shape \(1, 6, 4, 8\), while the example has 6 rows"),
        (partial(Reshaped, lambda x: x.transpose(0, 1)), 6, r"shape \(4, 6, 8\), while the example has 6 rows"),
    ],
)
def test_a_dimension_0_that_is_not_the_batch_is_told(make, length, why):
    with pytest.warns(vk.VCLWarning, match=f"layer 'act.*{why}.*Leave the layer out with layers=, or make") as caught:
        vk.attach(make(), torch.randn(length, 4, 8))
    assert len(caught) == 1


@pytest.mark.parametrize(
    "make",
    [
        partial(encoder_layer, batch_first=True),
        partial(Reshaped, lambda x: x.flatten(0, 1)),  # windows, or tokens as rows
        partial(Reshaped, torch.clone),
    ],
)
def test_a_dimension_0_of_whole_samples_is_not_told(make):
    assert len(vk.attach(make(), torch.randn(6, 4, 8)).layers) == 1
