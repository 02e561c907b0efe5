"""Fashion-MNIST as it is published: gzipped IDX files."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np

from ..errors import DataError

DEFAULT_DIR = Path("/usr/share/datasets/fashion-mnist")
SOURCE = "install the Debian package dataset-fashion-mnist"
CLASSES = 10
UNSIGNED_BYTE = 8


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Return the unsigned bytes of one file: magic (0, 0, type, ndim), big-endian sizes, then the values."""
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path} is missing; {SOURCE}, or name its folder with --data-dir") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if content[:4] != bytes((0, 0, UNSIGNED_BYTE, ndim)) or len(content) < 4 + 4 * ndim:
        raise DataError(f"{path} is no IDX file of unsigned bytes with {ndim} dimensions; it starts {content[:4]!r}")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", ndim, offset=4))
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * ndim)
    if values.size != np.prod(shape, dtype=object):
        raise DataError(f"{path} holds {values.size} values, but its header says {shape}")
    return values.reshape(shape)


def read_split(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images (N, 1, H, W) and labels (N,) of ``"train"`` or ``"t10k"``."""
    images = read_idx(folder / f"{split}-images-idx3-ubyte.gz", 3)
    labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz", 1)
    if len(images) != len(labels) or not images.size:
        raise DataError(f"{folder}: {len(images)} {split} images, but {len(labels)} labels")
    if labels.max() >= CLASSES:
        raise DataError(f"{folder}: {split} labels must be below {CLASSES}, got {labels.max()}")
    return images[:, None], labels.astype(np.int64)
