"""Machine code of kernels for four targets, without a GPU: a sample of the launches that benchmarks.structure lists."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.structure.shapes import every_look, launches
from benchmarks.structure.table import markdown
from benchmarks.structure.targets import TARGETS, bytes_to_keep_in_flight, occupancy

ROOT = Path(__file__).parents[1]
STREAMING = {f"{kind}_{layout}" for kind in ("one_pass", "moments", "backward") for layout in ("spatial", "unit")}
STREAMING |= {"multiply"}
KERNELS = STREAMING | {"finalise"}
DTYPES = ("float32", "float64", "bfloat16", "float16")


def structure(env, *options):
    """Run ``benchmarks.structure``, whose last option is the file of its record."""
    command = [sys.executable, "-m", "benchmarks.structure", *options[:-1], "--json", options[-1]]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)


def compiled(folder, *options):
    """What a process without the interpreter compiles, as a record."""
    path = folder / "sample.json"
    run = structure({name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}, *options, path)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """A sample for every target."""
    return compiled(tmp_path_factory.mktemp("structure"), "--sample")


def test_every_kernel_in_every_dtype(tmp_path):
    """A statement that fits one dtype alone is compiled for the others too, unless it stands in another branch."""
    rows = compiled(tmp_path, "--every-dtype", "--targets", "sm_90")["kernels"]
    found = {(row["kernel"], dtype) for row in rows for dtype in DTYPES if dtype in row["case"]}
    # finalise sees no x: float64 and what is float32 to it
    wanted = {(name, dtype) for name in STREAMING for dtype in DTYPES}
    assert found >= wanted | {("finalise", "float32"), ("finalise", "float64")}


def each(record):
    return [(row, target, row[target]) for row in record["kernels"] for target in record["targets"]]


def test_every_kernel_for_every_target_without_spills(record):
    assert record["targets"] == list(TARGETS) == ["sm_80", "sm_90", "sm_100", "gfx942"]
    assert {row["kernel"] for row in record["kernels"]} == KERNELS
    for row, target, at in each(record):
        assert not at["spills"], (row, target)
        assert 0 < at["registers"] <= 255, (row, target)


def test_wide_accesses(record):
    """128 bits where rows of the tile and their distances are multiples of 16 bytes; on gfx942 at least 64."""
    wide = [found for found in each(record) if found[0]["wide"]]
    assert {row["kernel"] for row, _, _ in wide} == STREAMING
    for row, target, at in wide:
        enough = {"128", "256"} if target.startswith("sm") else {"64", "128", "256"}
        assert enough & set(at["loads"]), (row, target)
        if row["writes"]:
            assert enough & set(at["stores"]), (row, target)


def test_enough_is_in_flight(record):
    """Little's law; or a quarter of the warps, which can have four 128-bit loads each on their way; or those 32 KiB."""
    for row, target, at in each(record):
        if row["kernel"] in STREAMING:
            enough = at["in_flight_when_full"] >= bytes_to_keep_in_flight(target)
            warps_alone = at["resident_warps"] >= TARGETS[target].warps / 4
            assert enough or warps_alone or at["accesses_when_full"] >= 32 << 10, (row, target)


def test_occupancy_agrees_with_llvm(record):
    """LLVM counts scalar registers too, of which more than 100 cost a warp; and no shared memory."""
    for row, target, at in each(record):
        if target == "gfx942":
            ours = occupancy(target, 1, at["registers"], 0).warps // 4
            assert 0 <= ours - at["compiler_warps_of_partition"] <= 1, row


@pytest.mark.parametrize(
    ("target", "warps", "registers", "shared", "blocks", "limit"),
    [
        ("sm_90", 4, 32, 0, 16, "warps"),
        ("sm_90", 1, 32, 0, 32, "blocks"),
        ("sm_90", 8, 128, 0, 2, "registers"),
        ("sm_90", 8, 129, 0, 1, "registers"),  # 136 with the granule: 3 warps of each partition
        ("sm_90", 4, 32, 32768, 6, "shared memory"),  # 228 KiB / 33 KiB
        ("sm_80", 4, 32, 32768, 4, "shared memory"),
        ("gfx942", 1, 64, 0, 32, "warps"),  # of one warp: no limit of blocks
        ("gfx942", 4, 65, 0, 7, "registers"),
        ("gfx942", 4, 32, 20000, 3, "shared memory"),
    ],
)
def test_occupancy_by_hand(target, warps, registers, shared, blocks, limit):
    found = occupancy(target, warps, registers, shared)
    assert (found.blocks, found.warps, found.limit) == (blocks, blocks * warps, limit)


def test_a_table_has_a_row_for_each_launch(record):
    lines = markdown(record).splitlines()
    assert sum(line.startswith("|") for line in lines) >= len(record["kernels"])


def committed():
    """Cells of what ``python -m benchmarks.structure --sass sm_90 --first-steps --markdown`` wrote, in two parts."""
    lines = (ROOT / "benchmarks/results/structure/triton.md").read_text().split("## Every kernel")
    return [[[cell.strip() for cell in line.split(" | ")] for line in part.splitlines()] for part in lines]


def test_the_committed_table_has_no_spills():
    spills = [row[4] for row in committed()[0] if row[0].lstrip("| ") in KERNELS]
    assert spills == ["0"] * (len(KERNELS) * len(TARGETS))


def test_the_committed_table_is_of_these_launches():
    found = {(row[0].lstrip("| "), row[1], row[2], row[3], row[4]) for row in committed()[1] if len(row) > 5}
    calls = [(str(look), name, one.launch) for look in every_look() for name, one in launches(look)]
    launched = {
        (launch.name, look, name, " ".join(f"{axis}={size}" for axis, size in launch.tile.items()), str(launch.warps))
        for look, name, launch in calls
    }
    rows = {row for row in found if row[0] in KERNELS}
    assert len(rows) > 400
    assert rows <= launched


def test_the_interpreter_is_refused(tmp_path):
    run = structure({**os.environ, "TRITON_INTERPRET": "1"}, "--sample", tmp_path / "none.json")
    assert run.returncode != 0
    assert "TRITON_INTERPRET" in run.stderr
