"""The demo: readers of data files on tiny files of the true format, and one short run from end to end."""

import gzip
import json
import math
import struct

import numpy as np
import pytest
import torch
from cifar_files import packed_arrays, write_cifar, write_packed, write_python2

from benchmarks.demo import cifar, data, idx, packed, report
from benchmarks.demo.__main__ import main
from benchmarks.demo.errors import DataError
from benchmarks.demo.measure import kurtosis, saved_bytes

CPU = torch.device("cpu")
SIZES = {"train": 6, "t10k": 4}


def write_idx(path, values):
    header = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes()))


def write_fashion(folder):
    for split, count in SIZES.items():
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", np.arange(count * 784).reshape(count, 28, 28).astype("u1"))
        write_idx(folder / f"{split}-labels-idx1-ubyte.gz", np.arange(count, dtype="u1"))


def load(name, folder=None, **changed):
    return data.load(name, folder, **{"device": CPU, **changed})


def test_idx_files_give_their_pixels_and_labels(tmp_path):
    write_fashion(tmp_path)
    images, labels = idx.read_split(tmp_path, "train")
    assert images.shape == (6, 1, 28, 28)
    assert images[1, 0, 0, :3].tolist() == [784 % 256, 785 % 256, 786 % 256]
    assert labels.tolist() == list(range(6))


def test_fashion_mnist_is_standardised_by_the_training_set(tmp_path):
    write_fashion(tmp_path)
    found = load("fashion-mnist", tmp_path)
    assert (len(found.train_x), len(found.test_x)) == (6, 4)
    assert abs(found.train_x.mean()) < 1e-5
    assert abs(found.train_x.std(correction=0) - 1) < 1e-5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no gzip", "cannot be read"),
        (gzip.compress(bytes(100))[:20], "cannot be read"),
        (gzip.compress(bytes(100)), "no IDX file"),
        (gzip.compress(bytes((0, 0, 8, 3, 0))), "no IDX file"),
        (gzip.compress(bytes((0, 0, 8, 3)) + struct.pack(">3I", 2, 28, 28) + bytes(5)), r"5 values.*\(2, 28, 28\)"),
    ],
    ids=["not gzip", "cut off", "no magic number", "cut off in the header", "too few values"],  # gzip holds the time
)
def test_a_malformed_idx_file_is_named(tmp_path, content, message):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"train-images-idx3-ubyte.gz.*{message}"):
        idx.read_idx(path, 3)


def test_idx_labels_must_be_classes_and_as_many_as_images(tmp_path):
    write_fashion(tmp_path)
    for labels, message in ((np.arange(5), "5 labels"), (np.arange(5, 11), "below 10, got 10")):
        write_idx(tmp_path / "train-labels-idx1-ubyte.gz", labels.astype("u1"))
        with pytest.raises(DataError, match=message):
            idx.read_split(tmp_path, "train")


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("inner", [True, False])
def test_cifar_batches_give_their_pixels_and_labels(tmp_path, classes, inner):
    write_cifar(tmp_path / cifar.SUBFOLDER[classes] if inner else tmp_path, classes)
    images, labels = cifar.read_split(tmp_path, "train", classes)
    files = len(cifar.FILES[classes]["train"])
    assert images.shape == (3 * files, 3, 32, 32)
    assert labels.tolist() == [0, 1, 2] * files
    assert (images[:, 2, 31, 31] == labels).all()
    found = load(f"cifar{classes}", tmp_path)
    assert found.classes == classes
    assert found.test_y.tolist() == [0, 1, 2]


def test_cifar_channels_are_planes(tmp_path):
    pixels = np.arange(3072, dtype=np.uint16).astype(np.uint8)[None]
    pixels[0, 1024:2048] = 77
    write_python2(tmp_path / "train", {b"data": pixels, b"fine_labels": [99]})
    images, labels = cifar.read_batch(tmp_path / "train", 100)
    assert (images[0, 1] == 77).all()
    assert images[0, 0, 0, :3].tolist() == [0, 1, 2]
    assert images[0, 0, 1, 0] == 32
    assert labels.tolist() == [99]


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    trace = tmp_path / "trace"
    write_python2(tmp_path / "test_batch", {b"data": Malicious(trace), b"labels": []})
    with pytest.raises(DataError, match=r"test_batch.*refers to \w+\.open"):
        cifar.read_batch(tmp_path / "test_batch", 10)
    assert not trace.exists()


@pytest.mark.parametrize("classes", [10, 100])
def test_packed_parts_give_every_picture_with_its_label_and_split(tmp_path, classes):
    pixels, labels, split = write_packed(tmp_path, classes, training=220, tested=110)
    found = packed.read(tmp_path, classes)
    for name, flag in (("train", 0), ("test", 1)):
        images, of = found[name]
        assert images.shape == (np.sum(split == flag), 3, 32, 32)
        assert np.any(np.diff(of) < 0)  # not sorted by class
        expected = {(p.tobytes(), y) for p, y in zip(pixels[split == flag], labels[split == flag], strict=True)}
        assert {(p.tobytes(), y) for p, y in zip(np.ascontiguousarray(images), of, strict=True)} == expected


def test_either_format_of_cifar_is_read_from_the_folder_that_is_named(tmp_path):
    write_packed(tmp_path / "packed", 10)
    write_cifar(tmp_path / "batches", 10)
    assert load("cifar10", tmp_path / "packed").train_x.shape == (20, 3, 32, 32)
    assert load("cifar10", tmp_path / "batches").train_x.shape == (15, 3, 32, 32)


def test_a_missing_packed_part_is_named(tmp_path):
    write_packed(tmp_path, 10)
    (tmp_path / "cifar10-2.npz").unlink()
    with pytest.raises(DataError, match=r"cifar10-2\.npz is missing.*cifar10-1\.npz and cifar10-2\.npz"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": None}, "no entry 'split'"),
        ({"labels": np.array([0, 1, 2, 3, 10], np.uint8)}, "below 10, got 10"),
        ({"labels": np.zeros(4, np.uint8)}, "5 pictures, but 4 labels"),
        ({"data": np.zeros(20), "offsets": np.array([0, 20])}, "'data' must be bytes"),
        ({"data": np.zeros(20, np.uint8), "offsets": np.array([0, 20])}, "a strip cannot be read"),
    ],
    ids=["an entry is missing", "a wrong label", "too few labels", "no bytes", "no picture"],
)
def test_a_malformed_packed_part_is_named(tmp_path, change, message):
    write_packed(tmp_path, 10)
    part = packed_arrays(np.zeros((5, 3, 32, 32), np.uint8), np.zeros(5), np.zeros(5))
    changed = {key: value for key, value in {**part, **change}.items() if value is not None}
    np.savez(tmp_path / "cifar10-2.npz", **changed)
    with pytest.raises(DataError, match=rf"cifar10-2\.npz.*{message}"):
        load("cifar10", tmp_path)


def test_a_packed_part_that_is_no_archive_is_named(tmp_path):
    write_packed(tmp_path, 10)
    path = tmp_path / "cifar10-1.npz"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataError, match=r"cifar10-1\.npz cannot be read"):
        load("cifar10", tmp_path)


def test_pixels_are_standardised_each_over_the_training_set(tmp_path):
    pixels, _, split = write_packed(tmp_path, 10, training=40)
    found = load("cifar10", tmp_path, standardise="pixel")
    assert found.train_x.mean(0).abs().max() < 1e-5
    assert (found.train_x.std(0, correction=0) - 1).abs().max() < 1e-5
    training, tested = (pixels[split == flag].astype(float) for flag in (0, 1))
    expected = (tested - training.mean(0)) / training.std(0)
    assert found.test_x.sum((1, 2, 3)).sort().values.tolist() == pytest.approx(
        sorted(expected.sum((1, 2, 3)).tolist()), rel=1e-3
    )
    by_channel = load("cifar10", tmp_path)
    assert by_channel.train_x.mean(0).abs().max() > 0.01


def test_a_number_of_training_images_is_held_out_by_class(tmp_path):
    write_packed(tmp_path, 10, training=100, tested=20)
    found, other = (load("cifar10", tmp_path, held_out=30, split_seed=seed) for seed in (0, 1))
    assert (len(found.train_x), len(found.test_x)) == (70, 30)
    together = torch.cat([found.train_y, found.test_y]).bincount()
    assert (found.test_y.bincount() - 0.3 * together).abs().max() < 1
    assert not torch.equal(found.test_x, other.test_x)


PIXELS = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "no CIFAR-10 batch"),
        ({b"data": PIXELS}, "no CIFAR-10 batch"),
        ({b"data": PIXELS[:, :100], b"labels": [0, 1]}, r"shape \(N, 3072\)"),
        ({b"data": PIXELS.astype(float), b"labels": [0, 1]}, "unsigned bytes"),
        ({b"data": PIXELS, b"labels": [0]}, "2 integers from 0 to 9"),
        ({b"data": PIXELS, b"labels": [0, 10]}, "2 integers from 0 to 9"),
        ({b"data": PIXELS, b"labels": [0, [1]]}, "2 integers from 0 to 9"),
    ],
)
def test_a_malformed_cifar_file_is_named(tmp_path, content, message):
    write_python2(tmp_path / "test_batch", content)
    with pytest.raises(DataError, match=rf"test_batch.*{message}"):
        cifar.read_batch(tmp_path / "test_batch", 10)


def test_a_truncated_cifar_file_is_named(tmp_path):
    write_cifar(tmp_path, 10)
    path = tmp_path / "test_batch"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"test_batch cannot be read"):
        cifar.read_batch(path, 10)


@pytest.mark.parametrize(
    ("name", "missing", "source"),
    [
        ("fashion-mnist", "train-images-idx3-ubyte.gz", "dataset-fashion-mnist"),
        ("cifar10", "data_batch_1", "https://www.cs.toronto.edu/~kriz/cifar.html"),
        ("cifar100", "train", "https://www.cs.toronto.edu/~kriz/cifar.html"),
    ],
)
def test_missing_data_ends_with_a_message_that_names_file_and_source(tmp_path, capsys, name, missing, source):
    out = tmp_path / "out"
    assert main(["--dataset", name, "--data-dir", str(tmp_path), "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert str(tmp_path / missing) in message
    assert source in message
    assert not out.exists()


def test_cifar_without_a_folder_asks_for_one(capsys):
    assert main(["--dataset", "cifar10"]) == 2
    assert "--data-dir" in capsys.readouterr().err


def test_digits_load_and_a_validation_part_leaves_the_test_images_out():
    found, tuned = load("digits"), load("digits", held_out=0.2)
    assert found.train_x.shape == (1437, 1, 8, 8)
    assert len(found.test_x) == 360
    assert found.train_y.unique().tolist() == list(range(10))
    assert len(tuned.train_x) + len(tuned.test_x) == len(found.train_x)


class TwoUses:
    """A learner whose objective saves x, a view of it, y, and a parameter."""

    def __init__(self):
        self.model = torch.nn.Linear(8, 8, bias=False)

    def objective(self, x, y):
        return (x @ self.model.weight).sum() + (x[:2] @ self.model.weight).sum() + (y * y).sum()


def test_saved_bytes_count_each_storage_once_and_no_parameter():
    x, y = torch.randn(4, 8), torch.randn(4, 8, requires_grad=True)
    assert saved_bytes(TwoUses(), x, y) == x.nbytes + y.nbytes


def test_kurtosis_of_two_points_is_one_and_of_a_gaussian_three():
    torch.manual_seed(0)
    found = kurtosis(torch.stack([torch.arange(200_000.0) % 2, torch.randn(200_000)]))
    assert found.tolist() == pytest.approx([1, 3], abs=0.05)


def test_a_run_that_diverged_is_a_record_that_strict_parsers_read(tmp_path):
    report.write({"loss": [1.5, math.nan], "of": {"error": math.inf}}, tmp_path / "record.json")
    text = (tmp_path / "record.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"loss": [1.5, None], "of": {"error": None}}


@pytest.mark.parametrize("wrong", [["--batch-size", "8"], ["--seeds", "0"], ["--device", "nowhere"]])
def test_a_wrong_option_ends_with_code_2(wrong, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(wrong)
    assert exit_.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_quick_run_writes_a_record_and_a_picture(tmp_path, capsys):
    threads = torch.get_num_threads()
    arguments = ["--quick", "--dataset", "digits", "--seeds", "1", "--device", "cpu", "--threads", str(threads)]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "demo.json").read_text())
    assert set(record["methods"]) == {"none", "bn", "vcl"}
    for result in record["methods"].values():
        (losses,), (accuracies,) = result["train_loss"], result["test_accuracy"]
        assert len(losses) == len(accuracies) == 2
        assert all(math.isfinite(loss) for loss in losses)
        assert all(0 <= accuracy <= 1 for accuracy in accuracies)
        assert losses[1] < losses[0]
        assert result["saved_bytes"] > 0
        assert len(result["step_ms"]) == 5
        density, edges = result["pre_activations"]["density"], result["pre_activations"]["edges"]
        assert np.dot(density, np.diff(edges)) == pytest.approx(1, abs=1e-3)
    assert record["methods"]["bn"]["saved_bytes"] > record["methods"]["vcl"]["saved_bytes"]
    assert {"torch", "vcl_kernels"} <= set(record["versions"])
    picture = (tmp_path / "demo.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture[-12:] == b"\0\0\0\0IEND\xaeB\x60\x82"
    printed = capsys.readouterr().out
    assert "batch norm" in printed
    assert "demo.json" in printed
