"""Run by torchrun with two processes: an example, then a step of each trainer beside one by hand."""

from __future__ import annotations

import copy
import tempfile
from unittest import mock

import torch
import torch.distributed as dist
from by_hand import WEIGHT, assert_same, batches, gradients, loader, network, step, task
from libraries import library
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import vcl_kernels as vk
from examples import torchrun_ddp

RANKS, K = 2, 2  # K batches in each process are added for a step


def of_this_rank(data):
    return data[dist.get_rank() :: RANKS]


def lightning_step(net, data, folder):
    library("lightning")
    from vcl_kernels.integrations.lightning import VCLCallback

    callback = VCLCallback(weight=WEIGHT, beta_mode="learned", example_input=data[0][0], module="net")
    fit(lightning_module(net, data), callback, "ddp", folder)


def lightning_fsdp_step(net, data, folder):
    library("lightning")
    from lightning.pytorch.strategies import ModelParallelStrategy

    from vcl_kernels.integrations.lightning import VCLCallback

    def shard(module):
        vk.attach(net, data[0][0], weight=WEIGHT, beta_mode="learned", inject=True)
        for part in net:
            if next(part.parameters(), None) is not None:
                fully_shard(part, mesh=module.device_mesh["data_parallel"])
        fully_shard(net, mesh=module.device_mesh["data_parallel"])

    strategy = ModelParallelStrategy(data_parallel_size=RANKS, tensor_parallel_size=1)
    fit(lightning_module(net, data, shard), VCLCallback(), strategy, folder)


def lightning_module(net, data, configure=None):
    class Module(library("lightning").LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def training_step(self, batch, _index):
            return task(self.net, batch)

        def train_dataloader(self):
            return loader(of_this_rank(data))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1.0)

    if configure is not None:
        Module.configure_model = configure
    return Module()


def fit(module, callback, strategy, folder):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    ddp = {"accelerator": "cpu", "devices": RANKS, "strategy": strategy, "use_distributed_sampler": False}
    settings = {"max_epochs": 1, "accumulate_grad_batches": K, "logger": False, "default_root_dir": folder}
    trainer = library("lightning").Trainer(callbacks=[callback], **settings, **ddp, **quiet)
    trainer.fit(module)
    assert trainer.world_size == RANKS


def accelerate_step(net, data, _folder):
    accelerator = library("accelerate").Accelerator(cpu=True, gradient_accumulation_steps=K)
    from vcl_kernels.integrations.accelerate import attach

    assert accelerator.num_processes == RANKS
    handle = attach(accelerator, net, data[0][0], weight=WEIGHT)
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=1.0))
    for batch in of_this_rank(data):
        with accelerator.accumulate(model):
            accelerator.backward(task(model, batch))
            optimizer.step()
            optimizer.zero_grad()
    handle.remove()


def transformers_step(net, data, folder):
    transformers = library("transformers")
    from vcl_kernels.integrations.transformers import VCLTrainer

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, images, labels):
            return {"loss": task(self.net, (images, labels))}

    class InOrder(VCLTrainer):
        def _get_train_sampler(self, *_):
            return None

    samples = [{"images": x, "labels": y} for images, labels in data for x, y in zip(images, labels, strict=True)]
    rate = {"learning_rate": 1.0, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0}
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    settings = {"use_cpu": True, "ddp_backend": "gloo", "num_train_epochs": 1, "gradient_accumulation_steps": K}
    rows = len(data[0][0])
    arguments = transformers.TrainingArguments(folder, per_device_train_batch_size=rows, **settings, **rate, **quiet)
    trainer = InOrder(Net(), arguments, train_dataset=samples, vcl={"weight": WEIGHT})
    trainer.train()
    assert trainer.accelerator.num_processes == RANKS


def whole(net):
    """The same network with parameters that are not sharded."""
    other = network()
    state = vk.plain_state_dict(net.state_dict())
    other.load_state_dict({name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in state.items()})
    return other


def run_example():
    """Return the error, and each process's weights and losses."""
    attach, loss, handles, losses = vk.attach, vk.VCLHandle.loss, [], []
    ends = mock.patch.object(dist, "destroy_process_group")
    attaches = mock.patch.object(vk, "attach", lambda *args: handles.append(attach(*args)) or handles[-1])
    reads = mock.patch.object(vk.VCLHandle, "loss", lambda handle: losses.append(loss(handle)) or losses[-1])
    with ends, attaches, reads:
        error = torchrun_ddp.main(epochs=3, images=400)
    weights = torch.nn.utils.parameters_to_vector(handles[0].model.parameters()).detach()
    found = [None] * RANKS
    dist.all_gather_object(found, (weights, torch.stack(losses).detach()))
    return error, found


if __name__ == "__main__":
    torch.set_num_threads(1)
    error, ((weights, losses), (other_weights, other_losses)) = run_example()
    assert error < 45, error  # half of chance
    assert torch.equal(weights, other_weights)
    assert len(losses) == 3 * 8  # 400 images: batches of 25 in each process
    assert losses.min() > 0
    assert not torch.equal(losses, other_losses)
    data = batches(RANKS * K)
    for client in (lightning_step, lightning_fsdp_step, accelerate_step, transformers_step):
        net = network()
        before = copy.deepcopy(net)
        with tempfile.TemporaryDirectory() as folder:
            client(net, data, folder)
        assert_same(step(before, whole(net)), gradients(before, data))
        if dist.get_rank() == 0:
            print(client.__name__, "is that by hand", flush=True)
    dist.destroy_process_group()
