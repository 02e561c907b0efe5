"""Methods compared over many data sets: ranks, tests and performance profiles, on scipy's distributions."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
from scipy import stats

from .results import mean_and_error


def compare(accuracy: np.ndarray, methods: list[str]) -> dict[str, Any]:
    """Return what is said of accuracies (sets, methods).

    Ranks are shared among equals; so are wins. Friedman's test asks whether any method differs; Nemenyi's, whether two
    mean ranks do; Wilcoxon's signed ranks with Holm's correction, whether two methods' accuracies do.
    """
    ranks = stats.rankdata(-accuracy, axis=1)
    best = accuracy == accuracy.max(1, keepdims=True)
    pairs = list(combinations(range(len(methods)), 2))
    wilcoxon = holm([signed_ranks(accuracy[:, a] - accuracy[:, b]) for a, b in pairs])
    return {
        "sets": len(accuracy),
        "mean_accuracy": dict(zip(methods, accuracy.mean(0).tolist(), strict=True)),
        "mean_rank": dict(zip(methods, ranks.mean(0).tolist(), strict=True)),
        "wins": dict(zip(methods, (best / best.sum(1, keepdims=True)).sum(0).tolist(), strict=True)),
        "friedman_p": float(stats.friedmanchisquare(*accuracy.T).pvalue),
        "pairs": {
            (methods[a], methods[b]): {
                "difference": mean_and_error((accuracy[:, a] - accuracy[:, b]).tolist()),
                "nemenyi_p": nemenyi(float(ranks[:, a].mean() - ranks[:, b].mean()), *accuracy.shape),
                "wilcoxon_p": p,
            }
            for (a, b), p in zip(pairs, wilcoxon, strict=True)
        },
    }


def signed_ranks(differences: np.ndarray) -> float:
    """Return Wilcoxon's p; 1 where all are equal."""
    return float(stats.wilcoxon(differences, zero_method="pratt").pvalue) if differences.any() else 1.0


def nemenyi(difference: float, sets: int, methods: int) -> float:
    """Return the p of two mean ranks that differ by ``difference`` (Demšar 2006, section 3.2.2)."""
    q = abs(difference) / np.sqrt(methods * (methods + 1) / (6 * sets)) * np.sqrt(2)
    return float(stats.studentized_range.sf(q, methods, np.inf))


def holm(p: list[float]) -> list[float]:
    """Return each p corrected for their number, step by step from the least."""
    order = np.argsort(p)
    raised = np.maximum.accumulate([(len(p) - i) * p[k] for i, k in enumerate(order)])
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(raised, 1.0)
    return corrected.tolist()


def profiles(errors: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Return the share of sets on which each method's error is at most ``factor`` times the least: (factors, methods).

    Dolan and Moré's performance profile, with errors (sets, methods) above 0.
    """
    ratio = errors / errors.min(1, keepdims=True)
    return (ratio[None] <= factors[:, None, None] * (1 + 1e-12)).mean(1)
