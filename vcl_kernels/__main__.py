"""``python -m vcl_kernels``: what runs here, and what to install for the rest.

``python -m vcl_kernels plot run.csv run.png`` draws what a monitor wrote.
"""

import argparse
import csv
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

from . import __version__, backends
from .nn.plot import plot
from .nn.rows import STATISTICS, read_csv


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser("python -m vcl_kernels", description="Without arguments: what runs here.")
    command = parser.add_subparsers(dest="command").add_parser("plot", help="draw the CSV file of a VCLMonitor")
    command.add_argument("csv", help="what VCLMonitor(csv=...) wrote")
    command.add_argument("picture", help="file to write: .png, .pdf or .svg")
    command.add_argument("--statistics", nargs="+", choices=STATISTICS, help="which; default: all that were seen")
    options = parser.parse_args(arguments)
    if options.command is None:
        describe()
        return
    try:
        plot(read_csv(options.csv), options.picture, options.statistics)
    except (ImportError, OSError, ValueError, csv.Error) as error:
        parser.error(str(error))


def describe() -> None:
    """Print versions, devices and backends."""
    print(f"vcl_kernels {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"triton {_version('triton')}, CUDA {torch.version.cuda or 'none'}, ROCm {torch.version.hip or 'none'}")
    print(f"CPU: {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        print(f"GPU {index}: {torch.cuda.get_device_name(index)}")
    for name, state in backends().items():
        print(f"{name + ':':<11}{state}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


if __name__ == "__main__":
    main()
