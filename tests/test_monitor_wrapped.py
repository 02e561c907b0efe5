"""The monitor on models that are compiled or run in several processes."""

import csv
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import vcl_kernels as vk
from vcl_kernels import torch_private
from vcl_kernels.nn import undo
from vcl_kernels.nn.rows import STATISTICS

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Of losses of an earlier forward, which a compiler looks at without telling: unless warnings are errors
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.act, self.last = nn.Sequential(nn.Linear(4, 8), nn.ELU()), nn.Tanh(), nn.Linear(8, 2)

    def forward(self, x):
        return self.last(self.act(self.block(x)))


class Counting:
    """A backend of torch.compile that counts."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, _example):
        self.graphs += 1
        return graph.forward


def attached():
    torch.manual_seed(1)
    model, x = Net(), torch.randn(20, 4)
    return model, vk.attach(model, x, weight=0.5), x


def compiled_whole(model, backend):
    return torch.compile(model, backend=backend)


def compiled_fully(model, backend):
    return torch.compile(model, backend=backend, fullgraph=True)


def compiled_block(model, backend):
    model.block = torch.compile(model.block, backend=backend)
    return model


def compiled_block_in_place(model, backend):
    model.block[0].compile(backend=backend)
    return model


def distributed_compiled(model, backend):
    return DistributedDataParallel(torch.compile(model, backend=backend))


def compiled_distributed(model, backend):
    return torch.compile(DistributedDataParallel(model), backend=backend)


def numbers(row):
    return [row[name] for name in ("step", *STATISTICS)]


def train(run, handle, x, steps=6):
    for _ in range(steps):
        (run(x).square().mean() + handle.loss()).backward()


@pytest.mark.usefixtures("fresh_compiler", "one_process")
@pytest.mark.parametrize(
    "wrap",
    [
        compiled_whole,
        compiled_fully,
        compiled_block,
        compiled_block_in_place,
        distributed_compiled,
        compiled_distributed,
        lambda model, _: DistributedDataParallel(model),
    ],
)
def test_a_wrapped_model_shows_the_numbers_of_the_plain_one(wrap):
    model, handle, x = attached()
    with vk.VCLMonitor(handle, every=2) as plain:
        train(model, handle, x)
    counts = []
    for monitored in (False, True):
        torch.compiler.reset()
        model, handle, x = attached()
        backend = Counting()
        wrapped = wrap(model, backend)
        monitor = vk.VCLMonitor(wrapped, every=2) if monitored else None
        train(wrapped, handle, x)
        counts.append(backend.graphs)
    assert counts[0] == counts[1]
    assert counts[0] > 0 or wrap not in (compiled_whole, compiled_fully, compiled_block)
    monitor.flush()
    assert [row["layer"] for row in monitor.rows] == 3 * ["block.1", "act"]
    for found, wanted in zip(monitor.rows, plain.rows, strict=True):
        assert numbers(found) == pytest.approx(numbers(wanted), rel=1e-5)
    assert monitor.step == 6


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("watched_first", [False, True])
def test_a_model_compiled_with_the_monitors_hooks_says_so(in_place, watched_first):
    model, handle, x = attached()
    backend = Counting()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        monitor = vk.VCLMonitor(handle) if watched_first else None
        run = torch.compile(model, backend=backend, fullgraph=True)
        if in_place:
            model.compile(backend=backend, fullgraph=True)
            run = model
        monitor = monitor or vk.VCLMonitor(handle)
        train(run, handle, x)
        assert monitor.flush() == []
    (text,) = (str(warning.message) for warning in said if warning.category is vk.VCLWarning)
    assert "compiled together with its hooks" in text
    assert backend.graphs == 1
    assert all(p.grad is not None for p in model.parameters())
    assert monitor.step == 0


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("model", "text"), [(Net(), "compiled together with its hooks"), (Net().block, "saw no training forward")]
)
def test_a_model_that_was_compiled_before_says_that_nothing_is_seen(model, text):
    """Of a class of torch.nn, compiled code does not look for hooks that come later; of others it does."""
    x, backend = torch.randn(20, 4), Counting()
    run = torch.compile(model, backend=backend)
    run(x)
    monitor = vk.VCLMonitor(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", vk.VCLWarning)
        for _ in range(2):
            run(x)
        assert monitor.flush() == []
    (said,) = (str(warning.message) for warning in told if warning.category is vk.VCLWarning)
    assert text in said
    assert "what torch.compile returned" in said
    monitor.remove()
    graphs = backend.graphs
    with vk.VCLMonitor(run) as monitor:
        run(x)
    assert len(monitor.rows) > 0
    assert backend.graphs == graphs


@pytest.mark.usefixtures("one_process")
def test_the_mode_is_that_of_the_model_inside():
    model = DistributedDataParallel(Net())
    monitor = vk.VCLMonitor(model)
    for _ in range(2):
        model(torch.randn(20, 4))
        model.module.eval()
    assert model.training
    assert [row["step"] for row in monitor.flush()] == [0, 0]


@pytest.mark.usefixtures("fresh_compiler")
def test_two_monitors_leave_compiled_code_as_it_was():
    model, handle, x = attached()
    backend = Counting()
    run = torch.compile(model, backend=backend)
    with vk.VCLMonitor(run, every=2) as one, vk.VCLMonitor(run, every=3, unit="activation") as other:
        train(run, handle, x)
        assert not undo.uncompiled.looking
        assert backend.graphs == 1  # of the steps 1 and 5
        seen = [sorted({row["step"] for row in monitor.flush()}) for monitor in (one, other)]
    assert seen == [[0, 2, 4], [0, 3]]


def test_without_a_compiler_none_is_imported():
    code = "import sys, torch, vcl_kernels as vk; from torch import nn; before = 'torch._dynamo' in sys.modules; " + (
        "model = nn.Sequential(nn.ELU()); monitor = vk.VCLMonitor(model); model(torch.randn(20, 4)); "
        "assert len(monitor.flush()) == 1; assert ('torch._dynamo' in sys.modules) == before"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_names_are_those_of_the_model_inside():
    model = nn.Sequential(torch.compile(nn.Sequential(nn.Linear(4, 4), nn.ELU()), backend="eager"))
    model.add_module("module", torch.compile(nn.ReLU(), backend="eager"))
    monitor = vk.VCLMonitor(model)
    model(torch.randn(20, 4))
    assert [row["layer"] for row in monitor.flush()] == ["0.1", "module"]
    assert torch_private.plain_name("module._orig_mod.0") == "module.0"


RANKS = """
import sys, torch, types, vcl_kernels as vk
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
folder, rank = sys.argv[1], int(sys.argv[2])
class SummaryWriter:
    def __init__(self, logs):
        print(rank, logs)
    def add_scalar(self, *_): pass
    def flush(self): pass
    def close(self): pass
sys.modules["torch.utils.tensorboard"] = types.SimpleNamespace(SummaryWriter=SummaryWriter)
torch.manual_seed(rank)
model = nn.Sequential(nn.Linear(4, 8), nn.ELU(), nn.Linear(8, 2))
handle = vk.attach(model, torch.randn(20, 4))
monitors = [vk.VCLMonitor(model, csv=f"{folder}/{i}.csv", tensorboard=f"{folder}/{i}") for i in range(2)]
distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
wrapped = DistributedDataParallel(model)
for _ in range(2):
    (wrapped(torch.randn(20, 4)).mean() + handle.loss()).backward()
assert len(monitors[0].flush()) == 2
distributed.destroy_process_group()
"""


def test_of_two_processes_the_first_writes(tmp_path):
    """Monitors are made before the group. One is flushed in it; the other writes at exit, when the group is gone."""
    commands = [[sys.executable, "-c", RANKS, tmp_path, str(rank)] for rank in range(2)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for command in commands]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    for name in ("0.csv", "1.csv"):
        with (tmp_path / name).open(newline="") as file:
            assert [(row["step"], row["layer"]) for row in csv.DictReader(file)] == [("0", "1"), ("1", "1")]
    assert [output for output, _ in outputs] == [f"0 {tmp_path}/0\n0 {tmp_path}/1\n", ""]


@pytest.mark.usefixtures("one_process")
def test_the_rank_is_asked_for_when_rows_are_written(tmp_path, monkeypatch):
    model = Net()
    monitor = vk.VCLMonitor(model, csv=tmp_path / "run.csv")
    with monkeypatch.context() as before:
        before.setattr(torch.distributed, "is_initialized", lambda: False)
        model(torch.randn(20, 4))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert len(monitor.flush()) == 2
    assert not (tmp_path / "run.csv").exists()
