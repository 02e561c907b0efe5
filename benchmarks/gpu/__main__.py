"""Check and measure on a GPU: ``python -m benchmarks.gpu``, or ``make gpu-check ARGS="..."``.

Uses the Python that runs it and downloads nothing. Every stage has a log in the folder ``--out``, and
``summary.json`` there has what is known so far.
"""

from __future__ import annotations

import argparse
import platform
import signal
import subprocess
import sys
from pathlib import Path

from .runner import FAILED, PASSED, TIMED_OUT, Result, Runner
from .stages import BUDGET, ROOT, environment, stages

SHOWN = 1500  # characters of a failed stage's output, at the end


def main() -> int:
    known = [stage.name for stage in stages(Path(), BUDGET, False)]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything (%(default).0f)")
    parser.add_argument("--out", type=Path, default=Path("out/gpu-check"), help="folder for results (%(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: small sizes, in Triton's interpreter")
    parser.add_argument("--only", nargs="+", metavar="STAGE", choices=known, help=f"of {', '.join(known)}")
    options = parser.parse_args()
    if options.budget <= 0:
        parser.error(f"--budget must be positive; got {options.budget:g}")
    out = options.out.resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "summary.json").unlink(missing_ok=True)
    except OSError as error:
        parser.error(f"--out must be a folder that can be written; got {out}: {error}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a running stage is then stopped too
    chosen = [s for s in stages(out, options.budget, options.rehearse) if not options.only or s.name in options.only]
    about = {
        "python": platform.python_version(),
        "commit": _commit(),
        "budget": options.budget,
        "rehearsal": options.rehearse,
    }
    runner = Runner(ROOT, environment(options.rehearse), out)
    return report(runner.run_all(chosen, options.budget, about), out)


def report(results: list[Result], out: Path) -> int:
    """Print what became of each stage, and the ends of those that did not pass; return the exit code."""
    bad = [result for result in results if result.status in (FAILED, TIMED_OUT)]
    for result in bad:
        print(f"\n== the end of {out / result.stage}.log:\n{result.tail[-SHOWN:]}")
    print(f"\n== results in {out}")
    print(*results, sep="\n")
    return 1 if bad or not any(result.status == PASSED for result in results) else 0


def _commit() -> str | None:
    """The checkout's commit, with a mark if files differ from it."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # not a repository, or no git
        return None


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; summary.json has the stages that ended")
