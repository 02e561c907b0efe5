"""The C++ sources: headers that compile alone, and enumerations in the order of options.py."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

from vcl_kernels.options import ACTIVATIONS, FORMS

CSRC = Path(__file__).parent.parent / "csrc" / "cpu"
HEADERS = sorted(CSRC.glob("*.h"))
INSTRUCTION_SETS = (0, 1, 2) if platform.machine() == "x86_64" else (0,)  # VCL_LEVEL of isa.h


def levels(header):
    """Where the header's own text differs; kernels.h includes the others for every instruction set."""
    return INSTRUCTION_SETS if "VCL_LEVEL" in header.read_text() or header.name == "kernels.h" else (0,)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
@pytest.mark.parametrize(
    ("header", "level"), [(h, level) for h in HEADERS for level in levels(h)], ids=lambda v: getattr(v, "name", v)
)
def test_headers_compile_alone(header, level):
    command = [
        "g++",
        "-std=c++20",
        "-fsyntax-only",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-psabi",
        "-Wno-ignored-attributes",
    ]
    command += [f"-DVCL_LEVEL={level}", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command += [f"-I{path}" for path in include_paths()] if "<torch/" in header.read_text() else []
    done = subprocess.run([*command, "-x", "c++", "-include", header, "/dev/null"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("enum", "names"), [("Activation", ACTIVATIONS), ("Form", FORMS)])
def test_enumerations_have_the_order_of_options(enum, names):
    (body,) = re.findall(rf"enum class {enum} : int64_t {{(.*?)}}", (CSRC / "plain.h").read_text(), re.DOTALL)
    assert tuple(body.replace(",", " ").split()) == names


def test_activations_are_counted_to_the_last():
    assert f"kActivations = static_cast<int>(Activation::{ACTIVATIONS[-1]}) + 1;" in (CSRC / "plain.h").read_text()
