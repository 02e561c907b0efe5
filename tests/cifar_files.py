"""Tiny CIFAR sets in both formats: the published python batches, and the packed parts."""

import io
import pickle
import pickletools

import numpy as np
from PIL import Image

from benchmarks.accuracy.data import cifar, packed

OLD_NAMES = {"SHORT_BINBYTES": pickle.SHORT_BINSTRING, "BINBYTES": pickle.BINSTRING}


def write_python2(path, content):
    """Pickle as the published files are: protocol 2, bytes as the str of Python 2, numpy by its old name."""
    text = bytearray(pickle.dumps(content, protocol=3))
    for opcode, _, position in pickletools.genops(bytes(text)):
        if opcode.name in OLD_NAMES:
            text[position : position + 1] = OLD_NAMES[opcode.name]
    path.write_bytes(bytes(text).replace(b"\x80\x03", b"\x80\x02", 1).replace(b"cnumpy._core.", b"cnumpy.core."))


PLANES = np.arange(3072) // 5 % 256  # one image, of which each value lies apart from those of the other planes


def write_cifar(folder, classes):
    """Every file of the set, with three images; image i is ``PLANES`` + i, and has label i."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = ((PLANES + np.arange(3)[:, None]) % 256).astype(np.uint8)
    labels = {cifar.LABELS[classes]: [0, 1, 2], b"batch_label": b"a", b"filenames": [b"x.png"] * 3}
    if classes == 100:
        labels[b"coarse_labels"] = [0] * 3
    for name in cifar.FILES[classes]["train"] + cifar.FILES[classes]["test"]:
        write_python2(folder / name, {b"data": pixels, **labels})


STRIP = 4  # pictures; the real strips have 500


def packed_arrays(pixels, labels, split):
    """The entries of one part, for pictures (N, 3, 32, 32)."""
    rows = pixels.transpose(0, 2, 3, 1)
    strips = []
    for start in range(0, len(rows), STRIP):
        file = io.BytesIO()
        Image.fromarray(rows[start : start + STRIP].reshape(-1, 32, 3)).save(file, "WEBP", lossless=True)
        strips.append(np.frombuffer(file.getvalue(), np.uint8))
    return {
        "data": np.concatenate(strips),
        "offsets": np.cumsum([0, *map(len, strips)]),
        "labels": np.asarray(labels, np.uint8),
        "split": np.asarray(split, np.uint8),
        "class_names": np.array(["a", "b"]),
    }


def write_packed(folder, classes, training=20, tested=10, seed=0):
    """Both parts, sorted by class as the real ones are: images that a network could learn; return what they hold."""
    random = np.random.default_rng(seed)
    labels = np.sort(np.arange(training + tested) % classes)
    split = random.permutation(np.repeat([0, 1], [training, tested]))
    base = random.integers(0, 200, (classes, 3, 1, 1))
    noise = random.integers(0, 56, (len(labels), 3, 4, 4)).repeat(8, axis=2).repeat(8, axis=3)  # quick to compress
    pixels = (base[labels] + noise).astype(np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    half = len(labels) // 2
    for name, part in zip(packed.names(classes), (slice(half), slice(half, None)), strict=True):
        np.savez(folder / name, **packed_arrays(pixels[part], labels[part], split[part]))
    return pixels, labels, split
