"""What is checked and measured, most important first, with what each stage takes of a budget of eight minutes."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .runner import Stage

ROOT = Path(__file__).parents[2]
BUDGET = 480.0
SUITES = {"loss": (60.0, 130.0), "activation": (60.0, 130.0), "launch": (20.0, 45.0), "networks": (60.0, 120.0)}
SHARE = 0.85  # of a stage's time that a benchmark is told to plan with: it ends after the case that it is in
PYTHON = [sys.executable, "-m"]

# Tests whose kernels run where the tensors are: on the GPU if there is one
ON_DEVICE = ("loss", "gradients", "activation", "properties", "triton")
# A process for each core is enough: its oracles on the CPU, and Inductor, must not start as many again
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"), "1")
# What a rehearsal runs of them: a case of each file, of the fastest in the interpreter
REHEARSED = "triton and (zero_variance or beta_alone or parameters_of or shift_and or more_programs)"


def environment(rehearse: bool) -> dict[str, str]:
    """Return what every stage runs in: modules of this checkout, folders that can be written."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    env["PYTHONUNBUFFERED"] = "1"
    scratch = Path(tempfile.gettempdir()) / "vcl-gpu-check"
    env.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(scratch / "hypothesis"))
    if not os.access(Path.home(), os.W_OK):
        env.setdefault("TRITON_CACHE_DIR", str(scratch / "triton"))
    if rehearse:
        env.update(TRITON_INTERPRET="1", VCL_KERNELS_REHEARSE="1", CUDA_VISIBLE_DEVICES="")
    return env


def stages(out: Path, budget: float, rehearse: bool) -> list[Stage]:
    """Return every stage, in order of priority."""
    asked = ["--rehearse"] if rehearse else []
    no_pytest, no_suites = _lacking("pytest"), _lacking("pytest", "pytest_benchmark")
    tests = {"unavailable": no_pytest, "environment": ONE_THREAD}
    on_device = _tests(ON_DEVICE, rehearse, REHEARSED if rehearse else "triton")
    found = [
        Stage("environment", [*PYTHON, "benchmarks.gpu.environment", *asked], 5, 150, needed=True),
        Stage("cuda-tests", _tests(["cuda"], rehearse), 60, 150, **tests),  # type: ignore[arg-type]
        Stage("kernel-tests", on_device, 45, 150, **tests),  # type: ignore[arg-type]
        *(_sanitizer(tool, rehearse) for tool in ("memcheck", "racecheck")),
        _compile(rehearse),
        _build(out, rehearse),  # the CPU's backend: no stage on the GPU needs it
    ]
    for suite, times in SUITES.items():
        command = [*PYTHON, "benchmarks.speed", suite, "--out", str(out), *asked, "--budget"]
        found.append(Stage(f"benchmark-{suite}", command, *times, unavailable=no_suites, share=SHARE))
    scale = budget / BUDGET
    return [stage._replace(least=stage.least * scale, limit=stage.limit * scale) for stage in found]


def _compile(rehearse: bool) -> Stage:
    """Compile a sample of the kernels for sm_90 without a GPU: the rehearsal's other stages interpret them."""
    command = [*PYTHON, "benchmarks.structure", "--sample", "--targets", "sm_90"]
    unavailable = "" if rehearse else "the stages on the GPU compile what they run"
    return Stage("compile", command, 20, 120, unavailable=unavailable, environment={"TRITON_INTERPRET": "0"})


def _build(out: Path, rehearse: bool) -> Stage:
    """Build the native backend in place. A rehearsal builds into ``out``: others may use the checkout's binary."""
    require = {"VCL_KERNELS_REQUIRE_NATIVE": "1"}
    folders = ["--inplace"]
    if rehearse:
        folders = ["--force", "--build-lib", str(out / "build"), "--build-temp", str(out / "build" / "temp")]
        require["VCL_KERNELS_CXXFLAGS"] = "-O0"  # optimised, it takes two idle cores over a minute
    writable = os.access(ROOT, os.W_OK) and os.access(ROOT / "vcl_kernels", os.W_OK)
    reason = _lacking("setuptools", *([] if shutil.which("ninja") else ["ninja"]))
    reason = reason or ("" if writable or rehearse else f"{ROOT} is read-only")
    command = [sys.executable, "setup.py", "build_ext", *folders]
    return Stage("build", command, 20, 90, unavailable=reason, environment=require)


def _lacking(*modules: str) -> str:
    """Say which of the modules are not installed; empty if all are."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""


def _tests(names: Sequence[str], rehearse: bool, chosen: str = "") -> list[str]:
    """Return pytest over ``tests/test_NAME.py``; warnings of the machine's own versions are no errors.

    Most of the time goes to compiling kernels, one after another in each process: as many as there are cores, up to 16.
    """
    options = ["-v", "-ra", "--tb=short", "--durations=10", "-W", "default", "-p", "no:cacheprovider", "-o", "addopts="]
    options += ["-o", "faulthandler_timeout=60"]  # says where a kernel hangs
    options += ["-k", chosen] if chosen else []
    if not rehearse and importlib.util.find_spec("xdist") is not None:
        options += ["-n", str(min(16, os.cpu_count() or 1))]
    return [*PYTHON, "pytest", *(f"tests/test_{name}.py" for name in names), *options]


def _sanitizer(tool: str, rehearse: bool) -> Stage:
    script = [*PYTHON, "benchmarks.gpu.sanitized"]
    if rehearse:  # the script alone, once
        unavailable = "" if tool == "memcheck" else "the script was rehearsed under memcheck"
        return Stage(tool, script, 10, 60, unavailable=unavailable)
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    options = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "30"]
    options += ["--target-processes", "application-only"]  # compilers are not what is looked at
    options += ["--report-api-errors", "no"] if tool == "memcheck" else []  # PyTorch asks what a device can do
    return Stage(
        tool,
        [found or "compute-sanitizer", *options, *script],
        20,
        60,
        unavailable="" if found else "compute-sanitizer is not installed",
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # so that every tensor has bounds of its own
        lacking="Device not supported[^\n]*",
    )
