"""The study of defaults: its rules on made-up numbers, one training, the command in its smallest form."""

import pytest
import torch

from benchmarks.accuracy.__main__ import main
from benchmarks.accuracy.defaults import decision, study, tasks
from benchmarks.accuracy.defaults.choice import best_rates, candidates
from benchmarks.accuracy.defaults.settings import AUTHORS, BATCH_NORM, NONE, SETTINGS, TODAY
from benchmarks.accuracy.defaults.training import work
from benchmarks.accuracy.page import defaults as page

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),  # the paper's 2x2 kernels
]
OTHER = AUTHORS._replace(weight=0.1)


def record(setting, network, seed=0, *, error, nll, rate=0.1, variance="1 1 9", target="1 1 1", constancy="1 1 1"):
    unit = study.unit_of(setting, network, "", seed, validate=False, rate=rate)
    layers = {"activation_variance": variance, "channel_variance": variance, "target": target, "constancy": constancy}
    return unit | {"error": error, "nll": nll} | layers


def screened(setting, errors, nlls):
    return [record(setting, n, error=e, nll=v) for n, e, v in zip(tasks.SCREENED, errors, nlls, strict=True)]


def test_the_grid_is_the_planned_one():
    assert len(SETTINGS) == len(set(SETTINGS)) == 36 + 6 + 6
    assert {TODAY, AUTHORS} <= set(SETTINGS)


def test_the_rate_with_the_lower_error_is_taken_and_then_the_lower_likelihood():
    runs = [record(NONE, "demo", error=e, nll=v, rate=r) for e, v, r in ((2, 0.3, 0.05), (2, 0.2, 0.1), (3, 0.1, 0.2))]
    assert best_rates(runs) == {(NONE, "demo", ""): 0.1}


def test_candidates_are_the_best_of_each_kind_and_two_more():
    none = screened(NONE, (5, 5, 5), (0.2, 0.2, 0.2))
    better = {s: 0.1 + 0.001 * i for i, s in enumerate(s for s in SETTINGS if s not in (TODAY, AUTHORS))}
    runs = [r for s, nll in better.items() for r in screened(s, (5, 5, 5), 3 * (nll,))]
    harmful = screened(AUTHORS, (5, 6.1, 5), (0.01, 0.01, 0.01))  # the best, but for one error
    found = candidates([*none, *runs, *harmful, *screened(TODAY, (5, 5, 5), (0.3, 0.3, 0.3))])
    order = list(better)
    kinds = [next(s for s in order if s.beta == beta) for beta in ("1", "first batch", "running", "1e-3")]
    rest = [s for s in order if s not in kinds][:2]
    assert found == [*kinds, *rest, TODAY, AUTHORS]


def runs_of(setting, network, *, gain=0.0, noise=0.05, **layers):
    gains = [gain * (1 + noise * (seed - 2)) for seed in range(5)]
    return [record(setting, network, seed, error=5 - g, nll=0.2 - g / 20, **layers) for seed, g in enumerate(gains)]


@pytest.mark.parametrize(
    ("first", "second", "passes"),
    [
        ({"gain": 1.0, "constancy": "1 .8 .7"}, {"constancy": ".8 .8 .8"}, True),
        ({"gain": 1.0, "constancy": ".8 .8 .8"}, {"variance": "1.9 0.6 9"}, True),  # at its target, where it was not
        ({"gain": 1.0, "constancy": ".8 .8 .8"}, {"variance": "2.1 0.6 9"}, False),  # one of three layers
        (
            {"gain": 1.0, "constancy": ".8 .8 .8"},
            {"constancy": ".95 .95 .95", "variance": "8 9 9"},
            False,
        ),  # does not act
        ({"gain": 1.0, "constancy": ".8 .8 .8"}, {"constancy": ".8 .8 .8", "gain": -0.6}, False),  # harms
        ({"gain": 1.0, "constancy": ".8 .8 .8"}, {"constancy": ".8 .8 .8", "gain": -0.6, "noise": 2}, True),  # unsure
        ({"gain": 0.0, "constancy": ".8 .8 .8"}, {"constancy": ".8 .8 .8"}, False),  # gains nowhere
    ],
)
def test_the_rule(first, second, passes):
    none = [r for network in ("demo", "tables") for r in runs_of(NONE, network, variance="8 9 9")]
    judged = decision.judge([*none, *runs_of(OTHER, "demo", **first), *runs_of(OTHER, "tables", **second)])
    assert decision.passes(judged[OTHER]) == passes
    assert decision.decide(judged) == (OTHER if passes else None)


def test_of_those_that_pass_the_one_with_the_better_likelihood_is_the_default():
    gains = {OTHER: 0.5, AUTHORS: 1.0, BATCH_NORM: 2.0}
    runs = [run for setting, gain in gains.items() for run in runs_of(setting, "demo", gain=gain)]
    runs += runs_of(NONE, "demo", variance="8 9 9")
    assert decision.decide(decision.judge(runs)) == AUTHORS


@pytest.mark.parametrize("network", ["resnet-relu", "elu-11"])
def test_both_gradients_of_a_step_are_clipped_apart(network, monkeypatch):
    monkeypatch.setitem(tasks.TASKS, network, tasks.TASKS[network]._replace(images=60, batch=20, epochs=1))
    monkeypatch.setattr(tasks, "KEPT", 4500)
    norms, clip = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: norms.append(args[1]) or clip(*args))
    tasks.images.cache_clear()
    found = work(study.unit_of(AUTHORS, network, "", 1, validate=False, rate=0.05))
    tasks.images.cache_clear()
    assert norms == 3 * [1.0, 1.0]
    layers = decision.numbers(found["target"])
    assert len(layers) == len(decision.numbers(found["constancy"])) == {"elu-11": 10}.get(network, 7)
    assert all(target == pytest.approx(1.03, rel=0.01) for target in layers)


def test_the_command_and_its_section(tmp_path, monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "demo", tasks.TASKS["demo"]._replace(images=60, batch=20, epochs=1))
    monkeypatch.setattr(tasks, "KEPT", 4500)
    tasks.images.cache_clear()
    assert main(["defaults", "--quick", "--out", str(tmp_path)]) == 0
    tasks.images.cache_clear()
    text = "\n".join(page.section(tmp_path))
    assert f"| {TODAY} |" in text
    assert "likelihood, mean" in text
