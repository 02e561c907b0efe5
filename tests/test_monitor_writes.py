"""Where the monitor writes: CSV, TensorBoard, pictures; that nothing recorded is lost."""

import copy
import csv
import gc
import math
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn
from watched import hooks, net

import vcl_kernels as vk
from vcl_kernels.__main__ import main
from vcl_kernels.nn import look
from vcl_kernels.nn.plot import plot
from vcl_kernels.nn.rows import STATISTICS, read_csv


def written(path):
    return [(row["step"], row["layer"]) for row in read_csv(path)]


def test_csv_is_continued_with_one_header(tmp_path):
    model, x = net(), torch.randn(32, 4)
    path = tmp_path / "seen.csv"
    for _ in range(2):
        with vk.VCLMonitor(model, csv=path) as monitor:
            model(x)
            monitor.flush()
            model(x)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["layer"]) for row in rows] == 2 * [("0", "1"), ("0", "4"), ("1", "1"), ("1", "4")]
    assert float(rows[-1]["kurtosis"]) == monitor.rows[-1]["kurtosis"]


def test_tensorboard_gets_what_is_not_nan(monkeypatch):
    own, made = mock.Mock(), mock.Mock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=made))
    for given, writer in ((own, own), (Path("logs"), made.return_value)):
        with vk.VCLMonitor(net(), tensorboard=given) as monitor:
            monitor.model(torch.randn(32, 4))
        written = [call.args for call in writer.add_scalar.call_args_list]
        names = ("variance", "constancy", "kurtosis")
        assert written == [(f"{name}/{row['layer']}", row[name], 0) for row in monitor.rows for name in names]
        writer.flush.assert_called_once()
    made.assert_called_once_with(str(Path("logs").absolute()))
    made.return_value.close.assert_called_once()
    own.close.assert_not_called()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        vk.VCLMonitor(net(), tensorboard="logs")


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    model = net()
    with vk.VCLMonitor(model) as monitor:
        with pytest.raises(ValueError, match=r"call flush\(\)"):
            monitor.plot()
        for _ in range(3):
            model(torch.randn(32, 4))
    figure = monitor.plot(tmp_path / "seen.png", ["kurtosis", "variance"])
    assert [axes.get_title() for axes in figure.axes] == ["kurtosis", "variance"]
    line = figure.axes[0].lines[1]
    assert line.get_label() == "4"
    assert list(line.get_ydata()) == [row["kurtosis"] for row in monitor.rows if row["layer"] == "4"]
    assert (tmp_path / "seen.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="'skew'"):
        monitor.plot(statistics=["skew"])
    with pytest.raises(ValueError, match="at least one"):
        monitor.plot(statistics=[])


def test_plot_of_values_between_gaps_and_of_private_names():
    """A value without neighbours is a point; a name that begins with "_" is in the legend, and "$" is itself."""
    pytest.importorskip("matplotlib")
    values = {"_act": [1.0, math.nan, 2.0, math.nan], "a$_{": [1.0, 2.0, math.nan, 3.0]}
    rows = [
        {"step": step, "layer": layer, **dict.fromkeys(STATISTICS, math.nan), "loss": value}
        for layer, numbers in values.items()
        for step, value in enumerate(numbers)
    ]
    figure = plot(rows)
    figure.canvas.draw()
    assert [line.get_markevery() for line in figure.axes[0].lines] == [[0, 2], [3]]
    assert {line.get_marker() for line in figure.axes[0].lines} == {"."}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(values)


def test_plot_draws_variance_with_its_scale_and_leaves_out_what_is_nan(tmp_path):
    pytest.importorskip("matplotlib")
    model, x = net(), torch.randn(32, 4)
    with vk.VCLMonitor(model) as plain:
        model(x)
    assert [axes.get_title() for axes in plain.plot().axes] == ["variance", "constancy", "kurtosis"]
    assert [axes.get_title() for axes in plain.plot(statistics=["loss"]).axes] == ["loss"]
    with vk.VCLMonitor(vk.attach(model, x)) as monitor:
        for _ in range(3):
            (model(x).mean() + vk.handle_of(model).loss()).backward()
    figure = monitor.plot(tmp_path / "seen.png")
    assert [axes.get_title() for axes in figure.axes] == [name for name in STATISTICS if name != "scale"]
    (axes,) = (axes for axes in figure.axes if axes.get_title() == "variance")
    assert axes.get_yscale() == "log"
    rows = [row for row in monitor.rows if row["layer"] == "4"]
    variance, scale = axes.lines[2:]
    assert list(variance.get_ydata()) == [row["variance"] for row in rows]
    assert list(scale.get_ydata()) == [row["scale"] for row in rows]
    assert variance.get_color() == scale.get_color()
    assert scale.get_linestyle() == "--"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["1", "4"]


def test_plot_of_many_layers_has_a_colour_bar(tmp_path):
    pytest.importorskip("matplotlib")
    model = nn.Sequential(*(nn.Tanh() for _ in range(50)))
    with vk.VCLMonitor(model) as monitor:
        model(torch.randn(10, 4))
    figure = monitor.plot(tmp_path / "seen.png", ["kurtosis"])
    panel, bar = figure.axes
    assert figure.legends == []
    assert len({line.get_color() for line in panel.lines}) == 50
    labels = [label.get_text() for label in bar.get_yticklabels()]
    assert len(labels) == 10
    assert (labels[0], labels[-1]) == ("0", "49")


def test_the_plot_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path, picture = tmp_path / "run.csv", tmp_path / "run.png"
    for _ in range(2):  # of two runs, one behind the other
        with vk.VCLMonitor(model := net(), csv=path) as monitor:
            model(torch.randn(32, 4))
            model(torch.randn(32, 4))
    assert read_csv(path)[4:] == [pytest.approx(row, nan_ok=True) for row in monitor.rows]
    done = subprocess.run([sys.executable, "-m", "vcl_kernels", "plot", path, picture], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert picture.read_bytes()[:4] == b"\x89PNG"
    main(["plot", str(path), str(tmp_path / "run.svg"), "--statistics", "kurtosis"])
    assert (tmp_path / "run.svg").exists()
    (line, _) = plot(read_csv(path), statistics=["kurtosis"]).axes[0].lines
    assert [int(step) for step in line.get_xdata() if not math.isnan(step)] == [0, 1, 0, 1]
    assert len(line.get_xdata()) == 5  # a gap between the runs
    wrong = {"a,b\n1,2\n": "no CSV of VCLMonitor", "step,layer\n": "no rows", "step,layer\nx,1\n": "line 2"}
    wrong |= {"step,layer\n0,1,2\n": "line 2", "step,layer\n0," + "a" * 200_000 + "\n": "field larger"}
    for text, message in wrong.items():
        path.write_text(text)
        with pytest.raises(SystemExit):
            main(["plot", str(path), str(picture)])
        assert message in capsys.readouterr().err


def test_without_a_command_it_says_what_runs_here(capsys):
    main([])
    first, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith(f"vcl_kernels {vk.__version__}, torch {torch.__version__}")


# Nothing is lost


def test_a_line_that_a_killed_process_left_stays_alone(tmp_path):
    model, path = net(), tmp_path / "run.csv"
    for cut in (20, 0, 2):  # within a line, not at all, and behind its last field: that is a whole row
        with vk.VCLMonitor(model, csv=path):
            model(torch.randn(20, 4))
        path.write_bytes(path.read_bytes()[: -cut or None])
    assert written(path) == [(0, "1"), *[(0, "1"), (0, "4")] * 2]
    assert path.read_bytes().count(b"\r\n") == 6  # a header, five rows; the cut line is in one of them


def test_paths_stay_where_they_were(tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    monkeypatch.chdir(first)
    made = mock.Mock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=made))
    with vk.VCLMonitor(model := nn.Sequential(ModuleNamed("β")), csv="run.csv", tensorboard="logs"):
        model(torch.randn(20, 4))
        monkeypatch.chdir(second)
    assert written(first / "run.csv") == [(0, "0.β")]
    assert "β".encode() in (first / "run.csv").read_bytes()
    made.assert_called_once_with(str(first / "logs"))
    vk.VCLMonitor(model, tensorboard="gs://bucket/logs")._rows.report.said.add("unseen")  # noqa: SLF001  # so no warning
    assert list(second.iterdir()) == []


class ModuleNamed(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.add_module(name, nn.ELU())

    def forward(self, x):
        return next(self.children())(x)


@pytest.mark.parametrize("filtered", [False, True])
def test_an_error_of_the_training_is_not_replaced(filtered, tmp_path):
    """By one of writing, nor by its warning."""
    folder, model = tmp_path / "run", net()
    folder.mkdir()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("error" if filtered else "always", vk.VCLWarning)
        monitor = vk.VCLMonitor(model, csv=folder / "run.csv")
        model(torch.randn(20, 4))
        folder.rmdir()
        with pytest.raises(ZeroDivisionError), monitor:
            raise ZeroDivisionError
    assert ["could not be written" in str(warning.message) for warning in told] == [True] * (not filtered)
    assert len(monitor.rows) == 2
    assert hooks(model) == 0
    folder.mkdir()
    monitor.flush()
    assert written(folder / "run.csv") == [(0, "1"), (0, "4")]


def test_a_fork_writes_its_own_rows(tmp_path):
    """Those that wait are its parent's."""
    model, path = nn.Sequential(nn.ELU()), tmp_path / "run.csv"
    monitor = vk.VCLMonitor(model, csv=path)
    model(torch.randn(20, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork with threads
        child = os.fork()
    if child == 0:
        code = 1
        try:
            code = int([row["step"] for row in monitor.flush()] != [] or path.exists())
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    monitor.flush()
    assert written(path) == [(0, "0")]


def test_another_header_is_refused_before_anything_is_hooked(tmp_path):
    path, model = tmp_path / "run.csv", net()
    path.write_text("step,layer,loss\n0,1,0.5\n")
    with pytest.raises(ValueError, match="csv .*run.csv.* another header: 'step,layer,loss'"):
        vk.VCLMonitor(model, csv=path)
    assert hooks(model) == 0
    path.write_text("")
    with vk.VCLMonitor(model, csv=path):
        model(torch.randn(20, 4))
    assert written(path) == [(0, "1"), (0, "4")]


def test_a_cell_that_runs_again_replaces_its_monitor(tmp_path):
    model, x, path = net(), torch.randn(32, 4), tmp_path / "run.csv"
    for _ in range(2):
        monitor = vk.VCLMonitor(model, csv=path)
        for _ in range(2):
            model(x)
    assert hooks(model) == 2
    assert written(path) == [(0, "1"), (0, "4"), (1, "1"), (1, "4")]  # of the first, without a flush
    monitor.flush()
    assert len(written(path)) == 8


def test_a_monitor_that_its_model_holds_is_garbage_with_it(tmp_path):
    model, path = net(), tmp_path / "run.csv"
    model.monitor = vk.VCLMonitor(model, csv=path)
    model(torch.randn(20, 4))
    del model
    gc.collect()
    assert written(path) == [(0, "1"), (0, "4")]


def test_a_monitor_that_nobody_keeps_says_so():
    model = net()
    with pytest.warns(vk.VCLWarning, match="dropped before it saw a training forward"):
        vk.VCLMonitor(model)
    assert hooks(model) == 0


def test_a_monitor_that_saw_nothing_says_so():
    model = net().eval()
    with pytest.warns(vk.VCLWarning, match="saw no training forward"), vk.VCLMonitor(model):
        model(torch.randn(20, 4))
    monitor = vk.VCLMonitor(model)
    with pytest.raises(RuntimeError, match="before"), monitor:  # without a warning
        raise RuntimeError("before training")


EARLY = """
import sys, torch, vcl_kernels as vk
from torch import nn
model = nn.Sequential(nn.Linear(4, 8), nn.ELU())
monitor = vk.VCLMonitor(model, csv=sys.argv[1])
model(torch.randn(20, 4))
{end}
"""


@pytest.mark.parametrize("end", ["sys.exit(3)", "import os; os.fork() or sys.exit(0); os.wait(); raise ValueError"])
def test_the_end_of_a_script_loses_nothing(end, tmp_path):
    """A process that was forked writes nothing of it."""
    path = tmp_path / "run.csv"
    done = subprocess.run([sys.executable, "-c", EARLY.format(end=end), path], capture_output=True, text=True)
    assert done.returncode == (1 if "raise" in end else 3)
    assert written(path) == [(0, "1")]


def test_rows_that_cannot_be_written_wait(tmp_path):
    folder, model, x = tmp_path / "run", net(), torch.randn(20, 4)
    folder.mkdir()
    writer = mock.Mock()
    monitor = vk.VCLMonitor(model, csv=folder / "run.csv", tensorboard=writer)
    for step in range(2):
        model(x)
        if step == 0:
            folder.rmdir()
            with pytest.raises(FileNotFoundError):
                monitor.flush()
            assert [row["step"] for row in monitor.rows] == [0, 0]
            folder.mkdir()
    assert len(monitor.flush()) == 2
    assert written(folder / "run.csv") == [(0, "1"), (0, "4"), (1, "1"), (1, "4")]
    steps = [call.args[2] for call in writer.add_scalar.call_args_list if call.args[0] == "kurtosis/1"]
    assert steps == [0, 1]  # TensorBoard did not wait for the file


def test_a_tensorboard_that_fails_gets_each_row_once():
    writer, model = mock.Mock(), net()
    writer.add_scalar.side_effect = [None, None, None, OSError("full"), *[None] * 20]
    monitor = vk.VCLMonitor(model, tensorboard=writer)
    model(torch.randn(20, 4))
    with pytest.raises(OSError, match="full"):
        monitor.flush()
    monitor.flush()
    names = [call.args[0] for call in writer.add_scalar.call_args_list]
    assert names.count("variance/1") == names.count("kurtosis/1") == 1
    assert names[-3:] == ["variance/4", "constancy/4", "kurtosis/4"]


def test_a_full_disk_leaves_no_half_line(tmp_path):
    model, path = net(), tmp_path / "run.csv"
    monitor = vk.VCLMonitor(model, csv=path)
    model(torch.randn(20, 4))
    monitor.flush()
    before = path.read_bytes()
    model(torch.randn(20, 4))
    opened = Path.open

    def full(self, *arguments, **options):
        file = opened(self, *arguments, **options)
        write = file.write

        def half(text):
            write(text[: len(text) // 2])
            file.flush()
            raise OSError("no space left")

        return mock.MagicMock(wraps=file, write=half, __enter__=lambda _: mocked[0], __exit__=lambda *_: file.close())

    mocked = []

    def open_(self, *arguments, **options):
        mocked[:] = [full(self, *arguments, **options)]
        return mocked[0]

    with mock.patch.object(Path, "open", open_), pytest.raises(OSError, match="no space"):
        monitor.flush()
    assert path.read_bytes() == before
    monitor.flush()
    assert written(path) == [(0, "1"), (0, "4"), (1, "1"), (1, "4")]


def test_a_lost_row_is_told(tmp_path):
    folder, model = tmp_path / "run", net()
    folder.mkdir()
    monitor = vk.VCLMonitor(model, csv=folder / "run.csv")
    model(torch.randn(20, 4))
    folder.rmdir()
    with pytest.warns(vk.VCLWarning, match="could not be written .*run.csv"):
        del monitor


def test_a_copy_of_a_monitor_has_the_rows(tmp_path):
    model, path = net(), tmp_path / "run.csv"
    with vk.VCLMonitor(model, csv=path) as monitor:
        model(torch.randn(20, 4))
        monitor.flush()
        model(torch.randn(20, 4))
        for other in (copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor))):
            other.model(torch.randn(20, 4))
            assert other.flush() == []
            assert other.rows == [pytest.approx(row, nan_ok=True) for row in monitor.rows]
            assert (other.step, other.skipped) == (2, {})
            other.remove()
    assert len(written(path)) == 4


class ToMeta(nn.Module):
    def forward(self, x):
        return x.to("meta")


def test_layers_on_several_devices_are_fetched_apart(monkeypatch):
    """The meta device stands for a second one; nothing can be fetched from it, which costs its own row alone."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ELU(), ToMeta(), nn.ReLU())
    monitor = vk.VCLMonitor(model)
    monkeypatch.setattr(look, "why_not", lambda _: None)
    model(torch.randn(20, 4))
    assert monitor.skipped == {}
    with mock.patch.object(torch, "cat", wraps=torch.cat) as cat, pytest.warns(vk.VCLWarning, match="layer '3'"):
        first, second = monitor.flush()
    assert [{tensor.device.type for tensor in call.args[0]} for call in cat.call_args_list[:2]] == [{"cpu"}, {"meta"}]
    assert math.isfinite(first["variance"])
    assert math.isnan(second["variance"])
