"""Machine code of every kernel for four targets, without a GPU: no spills, 128-bit accesses where P or C allow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def compiled():
    """Kernels compiled in a process without the interpreter, as a list of records."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("compiled.py")], env=env, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def test_every_kernel_for_every_target(compiled):
    assert {r["target"] for r in compiled} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    kernels = {"one_pass_spatial", "one_pass_unit", "moments_spatial", "moments_unit", "finalise"}
    assert {r["kernel"] for r in compiled} == kernels | {"apply_spatial", "apply_unit", "multiply"}


def test_no_spills(compiled):
    assert [r for r in compiled if r["spills"]] == []


def test_wide_accesses(compiled):
    wide = [r for r in compiled if r["wide"] and r["target"].startswith("sm") and r["kernel"] != "finalise"]
    assert len(wide) > 30
    for record in wide:
        assert 128 in record["loads"], record
        writes_y = record["kernel"].startswith("moments") and record["activation"] >= 0
        if writes_y or record["kernel"].startswith(("one_pass", "apply", "multiply")):
            assert 128 in record["stores"], record
        if writes_y or record["kernel"].startswith("apply"):
            assert 16 not in record["stores"], record
