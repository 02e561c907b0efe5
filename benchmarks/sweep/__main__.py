"""``python -m benchmarks.sweep --out FOLDER [--budget SECONDS] [--rehearse]``: FOLDER/sweep.json, as it goes."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for sweep.json (out)")
    parser.add_argument("--budget", type=float, default=0.0, help="seconds after which no decision begins (no limit)")
    parser.add_argument("--seconds", type=float, default=0.5, help="seconds of timing for each decision (0.5)")
    parser.add_argument("--only", help="decisions whose name holds this")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, Triton's interpreter on a CPU")
    options = parser.parse_args(args)
    begun = time.perf_counter()
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    import torch
    import triton

    if not options.rehearse and not torch.cuda.is_available():
        print("no CUDA device is visible to torch; --rehearse runs tiny cases on the CPU", file=sys.stderr)
        return 2
    from .decisions import on_gpu, rehearsed
    from .measure import measured

    device = "cpu" if options.rehearse else "cuda"
    decisions = [d for d in (rehearsed() if options.rehearse else on_gpu()) if (options.only or "") in str(d)]
    done: list[dict[str, Any]] = []
    record = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU, Triton's interpreter",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "planned": len(decisions),
        "decisions": done,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path, wrong = options.out / "sweep.json", 0
    path.write_text(json.dumps(record, indent=1) + "\n")
    for decision in decisions:
        if options.budget and time.perf_counter() - begun > options.budget:
            break
        found = measured(decision, device, options.seconds)
        done.append(found)
        path.write_text(json.dumps(record, indent=1) + "\n")
        wrong += report(found)
    left = len(decisions) - len(done)
    why = f": the budget of {options.budget:g} s is spent" if left else ""
    print(f"{len(done)} decisions measured, {left} left{why}")
    return 1 if wrong else 0


def report(found: dict[str, Any]) -> int:
    """Print a decision; return how many of its settings gave wrong results."""
    print(found["decision"])
    timed = sorted((row for row in found["alternatives"] if "median" in row), key=lambda row: row["median"])
    for row in timed[:3]:
        print(f"  {row['median'] * 1e6:10.1f} µs  {row['settings']}")
    loss = found["loss_of_rule"]
    print(f"  rule: {found['rule']}" + ("" if loss is None else f"; {loss:.1%} slower than the best"))
    for row in found["alternatives"]:
        if row.get("wrong") or "failed" in row:
            print(f"  {row['settings']}: {row.get('wrong') or row['failed'].splitlines()[0]}")
    return sum(bool(row.get("wrong")) for row in found["alternatives"])


if __name__ == "__main__":
    sys.exit(main())
