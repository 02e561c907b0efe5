"""Run a suite and write its record: SUITE.json and SUITE.md."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from .report import COLUMNS, write

SUITES = (*COLUMNS, "launch")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for SUITE.json and SUITE.md (out)")
    parser.add_argument("--budget", type=float, default=0.0, help="seconds after which no contest begins (no limit)")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, Triton's interpreter on a CPU")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # pytest then still writes what it has
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        full = Path(folder, "full.json")
        tests = f"{Path(__file__).with_name('test_speed.py')}::test_{options.suite}"
        arguments = [tests, "-q", "--benchmark-quiet", f"--benchmark-json={full}", f"--budget={options.budget}"]
        code = pytest.main([*arguments, *(["--rehearse"] if options.rehearse else [])])
        if full.exists() and full.stat().st_size:
            record = options.out / f"{options.suite}.json"
            condensed = condense(json.loads(full.read_text()), options.suite)
            record.write_text(json.dumps(condensed, separators=(",", ":")) + "\n")  # a third as long
            print(write(record))
    over = options.budget and code == pytest.ExitCode.INTERRUPTED  # by the suite itself: its time is over
    return 0 if over else int(code)


def condense(full: dict[str, Any], suite: str) -> dict[str, Any]:
    """Keep what the report reads, and every sample, rounded to five digits."""

    def entry(of: dict[str, Any]) -> dict[str, Any]:
        quartiles = {key: _five_digits(of["stats"][key]) for key in ("median", "q1", "q3")}
        return {**of["extra_info"], **quartiles, "seconds": [_five_digits(seconds) for seconds in of["stats"]["data"]]}

    return {
        "machine_info": full["machine_info"]["vcl"],
        "commit_info": {key: full["commit_info"].get(key) for key in ("id", "dirty")},
        "benchmarks": [entry(of) for of in full["benchmarks"]],
        **{key: full[key] for key in ("datetime", "version")},
        "suite": suite,
    }


def _five_digits(seconds: float) -> float:
    return float(f"{seconds:.5g}")


if __name__ == "__main__":
    sys.exit(main())
