"""What the sections share: tables, links, how a file was made."""

from __future__ import annotations

from typing import Any

from ..options import parse

SHOWN = "../benchmarks/results/accuracy"  # from the page
OTHERS = ("none", "bn")  # what VCL is compared with
UNSAID = ("study", "out", "processes", "minutes")  # of a study's settings: they do not change its results


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]] + [""]


def none_yet(title: str, command: str) -> list[str]:
    return [f"## {title}", "", f"Not measured yet: `{command}`.", ""]


def linked(name: str) -> str:
    """Return a link to a file of results."""
    return f"[{name}.csv]({SHOWN}/{name}.csv)"


def made(command: str, name: str) -> str:
    """Return the sentence that says how a file of results is made."""
    return f"`python -m benchmarks.accuracy {command}` makes {linked(name)}."


def asked_for(settings: dict[str, Any]) -> str:
    """Return the options of an image study that are not the default."""
    default = vars(parse(["images"]))
    changed = {k: v for k, v in settings.items() if k in default and v not in (None, default[k]) and k not in UNSAID}
    changed |= {"data_dir": "FOLDER"} if str(settings["dataset"]).startswith("cifar") else {}
    words = {
        k: " ".join(map(str, v)) if isinstance(v, list) else "" if v is True else str(v) for k, v in changed.items()
    }
    return " ".join(f"--{k.replace('_', '-')} {v}".strip() for k, v in words.items())
