"""``python -m vcl_kernels``: what runs here, and what to install for the rest."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from . import __version__, backends


def main() -> None:
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
