"""Readers of the accuracy studies' image sets, on tiny files of the true formats."""

import gzip
import struct

import numpy as np
import pytest
import torch
from cifar_files import PLANES, packed_arrays, write_cifar, write_packed, write_python2

from benchmarks.accuracy import data
from benchmarks.accuracy.__main__ import main
from benchmarks.accuracy.data import cifar, idx, packed
from benchmarks.accuracy.errors import DataError

PIXELS = np.zeros((2, 3072), np.uint8)


def write_idx(path, values):
    header = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes()))


def write_fashion(folder):
    for split, count in (("train", 6), ("t10k", 4)):
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", np.arange(count * 784).reshape(count, 28, 28).astype("u1"))
        write_idx(folder / f"{split}-labels-idx1-ubyte.gz", np.arange(count, dtype="u1"))


def load(name, folder=None, **changed):
    return data.load(name, folder, **{"device": torch.device("cpu"), **changed})


def test_idx_files_give_their_pixels_and_labels_standardised_by_the_training_set(tmp_path):
    write_fashion(tmp_path)
    images, labels = idx.read_split(tmp_path, "train")
    assert images.shape == (6, 1, 28, 28)
    assert images[1, 0, 0, :3].tolist() == [784 % 256, 785 % 256, 786 % 256]
    assert labels.tolist() == list(range(6))
    found = load("fashion-mnist", tmp_path)
    assert (len(found.train_x), len(found.test_x)) == (6, 4)
    assert abs(found.train_x.mean()) < 1e-5
    assert abs(found.train_x.std(correction=0) - 1) < 1e-5
    for wrong, message in (np.arange(5), "5 labels"), (np.arange(5, 11), "below 10, got 10"):
        write_idx(tmp_path / "train-labels-idx1-ubyte.gz", wrong.astype("u1"))
        with pytest.raises(DataError, match=message):
            idx.read_split(tmp_path, "train")


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


@pytest.mark.parametrize(("classes", "inner"), [(10, True), (10, False), (100, True)])
def test_cifar_batches_give_their_pixels_and_labels(tmp_path, classes, inner):
    write_cifar(tmp_path / cifar.SUBFOLDER[classes] if inner else tmp_path, classes)
    images, labels = cifar.read_split(tmp_path, "train", classes)
    files = len(cifar.FILES[classes]["train"])
    assert labels.tolist() == [0, 1, 2] * files
    planes = (PLANES + np.arange(3)[:, None]) % 256  # channels, then rows, then columns
    assert (images == np.tile(planes.reshape(3, 3, 32, 32), (files, 1, 1, 1))).all()
    found = load(f"cifar{classes}", tmp_path)
    assert found.classes == classes
    assert found.test_y.tolist() == [0, 1, 2]


class Malicious:
    def __reduce__(self):
        return open, ("trace", "w")


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_python2(tmp_path / "test_batch", {b"data": Malicious(), b"labels": []})
    with pytest.raises(DataError, match=r"test_batch.*refers to \w+\.open"):
        cifar.read_batch(tmp_path / "test_batch", 10)
    assert not (tmp_path / "trace").exists()


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
        (None, "cannot be read"),
    ],
)
def test_a_malformed_cifar_file_is_named(tmp_path, content, message):
    path = tmp_path / "test_batch"
    write_python2(path, {b"data": PIXELS, b"labels": [0, 1]} if content is None else content)
    if content is None:
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match=rf"test_batch.*{message}"):
        cifar.read_batch(path, 10)


@pytest.mark.parametrize("classes", [10, 100])
def test_packed_parts_give_every_picture_with_its_label_and_split(tmp_path, classes):
    pixels, labels, split = write_packed(tmp_path, classes, training=220, tested=110)
    found = packed.read(tmp_path, classes)
    for name, flag in (("train", 0), ("test", 1)):
        images, of = found[name]
        assert np.any(np.diff(of) < 0)  # not sorted by class
        expected = sorted((p.tobytes(), y) for p, y in zip(pixels[split == flag], labels[split == flag], strict=True))
        assert sorted((p.tobytes(), y) for p, y in zip(images, of, strict=True)) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": None}, "no entry 'split'"),
        ({"labels": np.array([0, 1, 2, 3, 10], np.uint8)}, "below 10, got 10"),
        ({"labels": np.zeros(4, np.uint8)}, "5 pictures, but 4 labels"),
        ({"data": np.zeros(20), "offsets": np.array([0, 20])}, "'data' must be bytes"),
        ({"data": np.zeros(20, np.uint8), "offsets": np.array([0, 20])}, "a strip cannot be read"),
        (b"no archive", "cannot be read"),
        (None, r"is missing.*cifar10-1\.npz and cifar10-2\.npz"),
    ],
    ids=["an entry is missing", "a wrong label", "too few labels", "no bytes", "no picture", "no archive", "no file"],
)
def test_a_malformed_packed_part_is_named(tmp_path, change, message):
    write_packed(tmp_path, 10)
    path = tmp_path / "cifar10-2.npz"
    path.unlink()
    if isinstance(change, dict):
        part = packed_arrays(np.zeros((5, 3, 32, 32), np.uint8), np.zeros(5), np.zeros(5))
        np.savez(path, **{key: value for key, value in {**part, **change}.items() if value is not None})
    elif change is not None:
        path.write_bytes(change)
    with pytest.raises(DataError, match=rf"cifar10-2\.npz.*{message}"):
        load("cifar10", tmp_path)


def test_pixels_are_standardised_each_over_the_training_set(tmp_path):
    pixels, _, split = write_packed(tmp_path, 10, training=40)
    found = load("cifar10", tmp_path, standardise="pixel")
    assert found.train_x.mean(0).abs().max() < 1e-5
    assert (found.train_x.std(0, correction=0) - 1).abs().max() < 1e-5
    training, tested = (pixels[split == flag].astype(float) for flag in (0, 1))
    expected = ((tested - training.mean(0)) / training.std(0)).sum((1, 2, 3))
    assert found.test_x.sum((1, 2, 3)).sort().values.tolist() == pytest.approx(sorted(expected.tolist()), rel=1e-3)
    assert load("cifar10", tmp_path).train_x.mean(0).abs().max() > 0.01  # by channel


def test_a_number_of_training_images_is_held_out_by_class(tmp_path):
    write_packed(tmp_path, 10, training=100, tested=20)
    found, other = (load("cifar10", tmp_path, held_out=30, split_seed=seed) for seed in (0, 1))
    assert (len(found.train_x), len(found.test_x)) == (70, 30)
    together = torch.cat([found.train_y, found.test_y]).bincount()
    assert (found.test_y.bincount() - 0.3 * together).abs().max() < 1
    assert not torch.equal(found.test_x, other.test_x)


@pytest.mark.parametrize(
    ("name", "folder", "missing", "source"),
    [
        ("fashion-mnist", ["--data-dir", "data"], "data/train-images-idx3-ubyte.gz", "dataset-fashion-mnist"),
        ("cifar10", ["--data-dir", "data"], "data/data_batch_1", "https://www.cs.toronto.edu/~kriz/cifar.html"),
        ("cifar100", ["--data-dir", "data"], "data/train", "https://www.cs.toronto.edu/~kriz/cifar.html"),
        ("cifar10", [], "--data-dir", "https://www.cs.toronto.edu/~kriz/cifar.html"),
    ],
)
def test_missing_data_ends_a_study_with_a_message(tmp_path, monkeypatch, capsys, name, folder, missing, source):
    monkeypatch.chdir(tmp_path)
    assert main(["images", "--dataset", name, *folder]) == 2
    message = capsys.readouterr().err
    assert missing in message
    assert source in message
