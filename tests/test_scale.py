"""The variance that beta asks for: the fitted formula, the integral, and layers that learn by VCL alone."""

import math

import numpy as np
import pytest
import torch

from benchmarks.accuracy import results
from benchmarks.accuracy.__main__ import main
from benchmarks.accuracy.scale.expected import expected_ratio, least, slope
from vcl_kernels.scale import variance_over_beta

pytestmark = pytest.mark.usefixtures("one_thread")

# paper.md's table: where the ratio's expectation is least, for Gaussian values
TABLE = {2: "0.38", 3: "0.64", 5: "1.03", 8: "1.50", 10: "1.78", 16: "2.6", 25: "3.7", 64: "8.6", 250: "32", 980: "123"}


@pytest.mark.parametrize("M", TABLE)
def test_the_multiple_of_beta_is_that_of_the_table(M):
    digits = len(TABLE[M].partition(".")[2])
    assert f"{variance_over_beta(M):.{digits}f}" == TABLE[M]


@pytest.mark.parametrize("M", [2, 5, 25, 980])
def test_the_multiple_of_beta_is_a_minimum_of_drawn_ratios(M):
    """The derivative by log s of the mean of (1 - s a / (s b + 1))² is 0, within 4 standard errors."""
    d, s = M - 1, variance_over_beta(M)
    a, b = torch.distributions.Chi2(torch.tensor(float(d), dtype=torch.float64)).sample((2, 400_000)) / d
    ratio = s * a / (s * b + 1)
    slope = -2 * (1 - ratio) * ratio / (s * b + 1)
    error = slope.std() / math.sqrt(len(slope))
    assert abs(slope.mean()) < 4 * error
    # It would be found if s were off by a half: the slope is then further from 0
    for wrong in (s / 1.5, s * 1.5):
        ratio = wrong * a / (wrong * b + 1)
        assert abs((-2 * (1 - ratio) * ratio / (wrong * b + 1)).mean()) > 4 * error


def test_the_multiple_of_beta_for_many_values():
    """With d = M - 1 and e = beta / variance, to second order in 1/d and e, the expectation is 4/d - 16 e/d + e²."""
    assert variance_over_beta(10**6) == pytest.approx(10**6 / 8, rel=1e-4)


@pytest.mark.parametrize("M", [1, 2.5, "2"])
def test_the_multiple_of_beta_wants_a_count(M):
    with pytest.raises((TypeError, ValueError), match="M must"):
        variance_over_beta(M)


# paper.md's table: the expectation where it is least, at variance = beta and at variance = 100 beta
LOSSES = {
    2: ("0.69", "1.19", "1849"),
    3: ("0.54", "0.61", "185"),
    5: ("0.394", "0.394", "12.2"),
    8: ("0.291", "0.321", "2.07"),
    10: ("0.250", "0.303", "1.15"),
    16: ("0.179", "0.279", "0.449"),
    25: ("0.127", "0.267", "0.225"),
    64: ("0.056", "0.256", "0.069"),
    250: ("0.0156", "0.252", "0.0160"),
    980: ("0.0041", "0.250", "0.0041"),
}


@pytest.mark.parametrize("M", LOSSES)
def test_the_expectation_is_that_of_the_table(M):
    at_beta, far = expected_ratio(np.array([1.0, 100.0]), M)
    for found, said in zip((least(M)[1], at_beta, far), LOSSES[M], strict=True):
        digits = len(said.partition(".")[2])
        assert found == pytest.approx(float(said), abs=10**-digits)  # 1 in its last digit


@pytest.mark.parametrize("M", [2, 5, 25, 1000])
@pytest.mark.parametrize("s", [0.1, 1.0, 10.0])
def test_the_expectation_is_the_mean_of_drawn_ratios(M, s):
    a, b = np.random.default_rng(0).chisquare(M - 1, (2, 400_000)) / (M - 1)
    drawn = (1 - s * a / (s * b + 1)) ** 2
    assert abs(expected_ratio(s, M) - drawn.mean()) < 4 * drawn.std() / len(drawn) ** 0.5


def test_the_fitted_formula_is_within_its_error_of_the_integral():
    sizes = sorted({*range(2, 40), *np.geomspace(40, 1e5, 15).astype(int).tolist()})
    errors = [variance_over_beta(M) / least(M)[0] - 1 for M in sizes]
    assert max(map(abs, errors)) < 0.002


def test_the_slope_pulls_to_the_minimum():
    place, _ = least(5)
    assert slope(place / 4, 5) < -0.1
    assert slope(place * 4, 5) > 0.1
    assert abs(slope(place, 5)) < 1e-3


def test_scale_study(tmp_path):
    assert main(["scale", "--quick", "--out", str(tmp_path)]) == 0
    rows = results.read("scale", tmp_path)
    assert {(row["part"], row["form"], row["beta_mode"]) for row in rows} == {
        ("targets", "ratio", "fixed"),
        ("weights", "ratio", "fixed"),
        ("forms", "ratio", "learned"),
        ("forms", "ratio", "running"),
        ("forms", "relative_variance", "fixed"),
    }
    for row in rows:  # few steps: towards the target, not yet there
        if row["part"] == "targets" and row["start"] != 1:
            assert (row["variance"] > row["first"]) == (row["start"] < 1)
        assert row["low"] <= row["variance"] <= row["high"] or row["part"] == "weights"
    assert [row["fitted"] for row in results.read("scale-expected", tmp_path)] == sorted(
        row["fitted"] for row in results.read("scale-expected", tmp_path)
    )
