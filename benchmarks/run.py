"""Run a suite and write its record: ``python -m benchmarks.run SUITE --out FOLDER [--budget SECONDS] [--rehearse]``."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path


def main() -> int:
    if "--rehearse" in sys.argv:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
    import pytest

    from .report import write
    from .suites import SUITES

    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for SUITE.json and SUITE.md (out)")
    parser.add_argument("--budget", type=float, default=0.0, help="seconds after which no contest begins (no limit)")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, Triton's interpreter on a CPU")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # pytest then still writes what it has
    options.out.mkdir(parents=True, exist_ok=True)
    record = options.out / f"{options.suite}.json"
    arguments = [f"--suite={options.suite}", f"--budget={options.budget}", f"--benchmark-json={record}"]
    arguments += ["--rehearse"] if options.rehearse else []
    settings = ["--benchmark-enable", "--benchmark-quiet", "-o", "filterwarnings=default", "-p", "no:xdist", "-q"]
    code = pytest.main([str(Path(__file__).with_name("bench.py")), *settings, *arguments])
    if record.exists() and record.stat().st_size:
        record.write_text(json.dumps(json.loads(record.read_text()), separators=(",", ":")) + "\n")  # a third as long
        print(write(record))
    over = options.budget and code == pytest.ExitCode.INTERRUPTED  # by the suite itself: its time is over
    return 0 if over else int(code)


if __name__ == "__main__":
    sys.exit(main())
