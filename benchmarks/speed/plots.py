"""The picture of a folder of records: ``python -m benchmarks.speed.plots FOLDER [PICTURE.png]``.

Share of the copy's bandwidth by size, time beside batch norm by shape, and what is held for backward.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.demo.picture import STYLE

from .report import SHOWN, Case, by_case, share

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"  # Okabe and Ito
SHARES = {  # suite, candidate: label, colour, marker
    ("loss", "relative_variance"): ("vcl_loss, all sub-batches", BLUE, "o"),
    ("activation", "elu with ratio"): ("ELU with one pair", ORANGE, "s"),
    ("activation", "elu with relative_variance"): ("ELU with all sub-batches", GREEN, "^"),
    ("activation", "elu"): ("F.elu alone", GREY, "x"),
}
BESIDE = {  # suite, candidate, batch norm's: label, colour
    ("loss", "relative_variance", "batch norm"): ("vcl_loss, all sub-batches : batch norm", BLUE),
    ("activation", "elu with ratio", "batch norm, elu"): ("ELU with one pair : batch norm + ELU", ORANGE),
    ("activation", "elu with relative_variance", "batch norm, elu"): ("ELU with all : batch norm + ELU", GREEN),
}
HELD = {
    "elu": "F.elu",
    "elu with ratio": "ELU with one pair",
    "elu with relative_variance": "ELU with all",
    "batch norm, elu": "batch norm + ELU",
}
SUITES = ("loss", "activation")

Records = dict[str, dict[str, Case]]


def digest(folder: Path) -> str:
    """Return a hash of the records that a picture is made from; it stands in the picture's ``Source``."""
    return hashlib.sha256(b"".join((folder / f"{suite}.json").read_bytes() for suite in SUITES)).hexdigest()


def draw(folder: Path, path: Path) -> None:
    """Write the picture of the records in ``folder``."""
    loaded = {suite: json.loads((folder / f"{suite}.json").read_text()) for suite in SUITES}
    records = {suite: by_case(record) for suite, record in loaded.items()}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(14, 4.6), layout="constrained")
        figure.suptitle(f"Forward + backward, {loaded['loss']['machine_info']['device']}", x=0.01, ha="left")
        left, middle, right = figure.subplots(1, 3, width_ratios=(1.1, 1.3, 0.8))
        bandwidth(left, records)
        beside(middle, records)
        memory(right, next(iter(records["activation"].values())))
        figure.savefig(path, dpi=130, metadata={"Source": digest(folder)})


def bandwidth(axes: Axes, records: Records) -> None:
    for (suite, candidate), (label, colour, marker) in SHARES.items():
        entries = [(case, case[candidate, "both"]) for case in records[suite].values() if (candidate, "both") in case]
        sizes = [entry["bytes"] / 1e6 for _, entry in entries]
        reached = [100 * (share(case, entry) or 0) for case, entry in entries]
        axes.plot(sizes, reached, marker, color=colour, label=label)
    axes.axhline(100, color=GREY, linewidth=0.8)
    axes.set(xscale="log", xlabel="MB of x", ylim=(0, None))
    axes.set_title("Share of the copy's bandwidth, %", loc="left", fontsize=11)
    axes.legend(fontsize=9)


def beside(axes: Axes, records: Records) -> None:
    names = list(records["loss"])[:SHOWN]
    height = 0.8 / len(BESIDE)
    for index, ((suite, candidate, other), (label, colour)) in enumerate(BESIDE.items()):
        cases = [records[suite][name] for name in names]
        ratio = [case[candidate, "both"]["median"] / case[other, "both"]["median"] for case in cases]
        axes.barh([place + index * height for place in range(len(names))], ratio, height, color=colour, label=label)
    axes.axvline(1, color=GREY, linewidth=0.8)
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(names))], names, fontsize=9)
    axes.invert_yaxis()
    axes.set_title("Time, batch norm's being 1", loc="left", fontsize=11)
    axes.legend(fontsize=9)


def memory(axes: Axes, case: Case) -> None:
    entries = [case[candidate, "both"] for candidate in HELD]
    axes.bar(list(HELD.values()), [e["held_bytes"] / e["bytes"] for e in entries], color=[GREY, ORANGE, GREEN, BLUE])
    axes.tick_params("x", rotation=30, labelsize=9)
    axes.set_title(f"Held for backward, in sizes of x\n{entries[0]['case']}", loc="left", fontsize=11)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    draw(source, Path(sys.argv[2]) if len(sys.argv) > 2 else source / "speed.png")
