"""``python -m benchmarks.structure [--targets sm_90 ...] [--json FILE] [--markdown FILE]``: no GPU is needed."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any


def dumped(record: dict[str, Any]) -> str:
    """JSON with a kernel on each line, so that a change shows in a diff."""
    kernels = ",\n".join(json.dumps(row) for row in record["kernels"])
    head = json.dumps({name: record[name] for name in ("versions", "targets", "first_steps") if name in record})
    return f'{head[:-1]}, "kernels": [\n{kernels}\n]}}\n'


def main(args: list[str] | None = None) -> int:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET=1 is set: nothing is compiled under the interpreter; unset it")
    from . import shapes
    from .first_step import first_steps
    from .records import collect
    from .table import markdown
    from .targets import TARGETS

    parser = argparse.ArgumentParser(prog="python -m benchmarks.structure", description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--sass", nargs="*", choices=[t for t in TARGETS if t.startswith("sm")], default=[])
    parser.add_argument("--every-dtype", action="store_true", help="every kernel in every dtype, as the tests take")
    parser.add_argument("--first-steps", action="store_true", help="what networks compile in their first step, timed")
    parser.add_argument("--sample", action="store_true", help="a few cases, as the tests take")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    given = parser.parse_args(args)
    chosen = shapes.sample_looks if given.sample else shapes.every_dtype if given.every_dtype else shapes.every_look
    looks = chosen()
    record = collect(looks, given.targets, given.sass, given.jobs)
    if given.first_steps:
        record["first_steps"] = first_steps(given.targets[0])
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(dumped(record))
    text = markdown(record)
    if given.markdown:
        given.markdown.parent.mkdir(parents=True, exist_ok=True)
        given.markdown.write_text(text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
