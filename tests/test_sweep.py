"""The sweep of launch settings, rehearsed: what is tried, what is checked before it is timed, what is written."""

import json

import pytest
from conftest import GPU

from benchmarks.sweep import __main__ as sweep
from benchmarks.sweep import decisions, measure

pytestmark = pytest.mark.skipif(GPU, reason="a rehearsal runs in the interpreter")


def run(folder, *more):
    code = sweep.main(["--rehearse", "--seconds", "0.01", "--out", str(folder), *more])
    return code, json.loads((folder / "sweep.json").read_text())


def test_a_rehearsal_end_to_end(tmp_path, capsys):
    code, record = run(tmp_path, "--only", "fused")
    assert code == 0
    (found,) = record["decisions"]
    rows = {row["settings"]: row for row in found["alternatives"]}
    assert found["kernel"] == "one_pass_spatial"
    assert len(rows) == len(found["alternatives"]) >= 4
    assert all(row["wrong"] is None and len(row["seconds"]) >= 3 for row in rows.values())
    best = min(row["median"] for row in rows.values())
    assert rows[found["best"]]["median"] == best
    assert found["loss_of_rule"] == rows[found["rule"]]["median"] / best - 1
    printed = capsys.readouterr().out
    assert found["rule"] in printed
    assert "1 decisions measured, 0 left" in printed


def test_a_spent_budget_ends_it_cleanly(tmp_path, capsys):
    code, record = run(tmp_path, "--budget", "1e-9")
    assert (code, record["decisions"]) == (0, [])
    assert record["planned"] == len(decisions.rehearsed())
    assert f"{record['planned']} left: the budget" in capsys.readouterr().out


def test_wrong_and_refused_settings_are_not_timed(tmp_path, monkeypatch, capsys):
    results, calls = measure._results, []

    def spoilt(decision, x):
        calls.append(x)
        if len(calls) == 4:
            raise RuntimeError("out of resource")
        found = results(decision, x)
        return [t + 1 for t in found] if len(calls) == 3 else found

    monkeypatch.setattr(measure, "_results", spoilt)
    code, record = run(tmp_path, "--only", "multiply")
    rows = record["decisions"][0]["alternatives"]
    assert code == 1
    assert rows[0]["wrong"] is None
    assert "differs by" in rows[1]["wrong"]
    assert "out of resource" in rows[2]["failed"]
    assert ["median" in row for row in rows[:4]] == [True, False, False, True]
    assert "out of resource" in capsys.readouterr().out


@pytest.mark.parametrize("decision", [*decisions.on_gpu(), *decisions.rehearsed()], ids=str)
def test_what_is_tried(decision):
    x = decision.case.tensor("meta")
    one = decision.recorded(x)
    settings = decisions.neighbours(one, decision.module)
    assert settings[0] == decisions.chosen(one, decision.module)
    assert len({measure.described(s) for s in settings}) == len(settings) >= 3
    for tried in settings:
        with decision.with_settings(tried):
            found = decision.recorded(x)
        assert found.launch.warps == tried.warps
        assert decisions.chosen(found, decision.module).tile == tried.tile


def test_every_kernel_is_swept():
    modules = {decision.module for decision in decisions.on_gpu()}
    assert modules == {decision.module for decision in decisions.rehearsed()} == set(decisions.FREE)
