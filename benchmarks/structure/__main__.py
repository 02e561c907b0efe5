"""``python -m benchmarks.structure [--targets sm_90 ...] [--json FILE] [--markdown FILE]``: no GPU is needed."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path


def main() -> int:
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
    parser.add_argument("--sample", action="store_true", help="eight cases, of all kernels, as the tests take")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    looks = shapes.sample_looks if options.sample else shapes.every_dtype if options.every_dtype else shapes.every_look
    record = collect(looks(), options.targets, options.sass, options.jobs)
    if options.first_steps:
        record["first_steps"] = first_steps(options.targets[0])
    text = markdown(record)
    for path, content in ((options.json, json.dumps(record) + "\n"), (options.markdown, text)):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
    if not options.markdown:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
