"""CIFAR-10 and CIFAR-100 packed into two .npz files each: strips of pictures as lossless WebP."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path

import numpy as np

from ..errors import DataError

PARTS = (1, 2)
KEYS = ("data", "offsets", "labels", "split")
SHUFFLED_BY = 0  # the files are sorted by class; a subset of the first images should not be


def names(classes: int) -> list[str]:
    """Return the names of the files."""
    return [f"cifar{classes}-{part}.npz" for part in PARTS]


def is_in(folder: Path, classes: int) -> bool:
    """Whether the folder has a part of the set."""
    return any((folder / name).exists() for name in names(classes))


def paths(folder: Path, classes: int) -> list[Path]:
    """Return the files.

    Raises:
        DataError: one is missing.
    """
    found = [folder / name for name in names(classes)]
    for path in found:
        if not path.exists():
            raise DataError(f"{path} is missing: the set is {' and '.join(names(classes))}, both in one folder")
    return found


def read(folder: Path, classes: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return images (N, 3, 32, 32) and labels (N,) of ``"train"`` and ``"test"``, in a fixed shuffled order.

    A part has its strips one behind another in ``data``, from ``offsets[i]`` to ``offsets[i + 1]``; ``labels`` and
    ``split`` (1: test) have an entry for each picture.
    """
    parts = [_part(path, classes) for path in paths(folder, classes)]
    images, labels, tested = (np.concatenate(found) for found in zip(*parts, strict=True))
    order = np.random.default_rng(SHUFFLED_BY).permutation(len(labels))
    images, labels, tested = images[order], labels[order], tested[order]
    found = {"train": (images[~tested], labels[~tested]), "test": (images[tested], labels[tested])}
    for split, (_, of) in found.items():
        if not len(of):
            raise DataError(f"{folder}: {' and '.join(names(classes))} have no {split} images")
    return found


def _part(path: Path, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            missing = [key for key in KEYS if key not in file.files]
            if missing:
                raise DataError(f"{path} is no part of CIFAR-{classes}: it has no entry {missing[0]!r}")
            data, offsets, labels, split = (file[key] for key in KEYS)
    except DataError:
        raise
    except Exception as error:  # what a broken archive raises is not documented
        raise DataError(f"{path} cannot be read: {error}") from error
    if data.dtype != np.uint8 or data.ndim != 1 or offsets.ndim != 1 or len(offsets) < 2:
        raise DataError(f"{path}: 'data' must be bytes, and 'offsets' where each strip begins and the last ends")
    images = np.concatenate([_strip(data[a:b].tobytes(), path) for a, b in pairwise(offsets)])
    if not len(images) == len(labels) == len(split):
        raise DataError(f"{path}: {len(images)} pictures, but {len(labels)} labels and {len(split)} entries of 'split'")
    if labels.max() >= classes:
        raise DataError(f"{path}: labels must be below {classes}, got {labels.max()}")
    return images, labels.astype(np.int64), split.astype(bool)


def _strip(content: bytes, path: Path) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{path}: a strip cannot be read: {error}") from error
    if pixels.shape[1] != 32 or pixels.shape[0] % 32:
        raise DataError(f"{path}: a strip must be 32 pixels wide and a multiple of that high, got {pixels.shape[:2]}")
    return pixels.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2)
