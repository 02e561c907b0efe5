"""Builds the native backend (csrc/) where a compiler allows it; installation succeeds either way."""

import glob
import os
import shlex
import sys
import sysconfig

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

STABLE_ABI = "0x020b000000000000"  # torch 2.11: one binary serves it and all later versions
PYTHON_ABI = "0x030A0000"  # Python 3.10


class OptionalBuild(BuildExtension):
    """A failed build leaves a package that works through its reference and says so.

    VCL_KERNELS_REQUIRE_NATIVE=1 makes it an error instead.
    """

    def run(self):
        try:
            super().run()
        except Exception as error:  # whatever the compiler, ninja or their absence raised
            if os.environ.get("VCL_KERNELS_REQUIRE_NATIVE") == "1":
                raise
            self.extensions.clear()
            print(f"vcl_kernels: native backend not built: {error}", file=sys.stderr)
            print("vcl_kernels: installed without it; see `python -m vcl_kernels`", file=sys.stderr)


def native():
    flags = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden"]
    flags += ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-ignored-attributes"]
    flags += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # GCC 12 on its own AVX-512 headers
    flags += [f"-DTORCH_TARGET_VERSION={STABLE_ABI}", f"-DPy_LIMITED_API={PYTHON_ABI}"]
    flags += shlex.split(os.environ.get("VCL_KERNELS_CXXFLAGS", ""))
    return CppExtension(
        "vcl_kernels._C",
        sorted(glob.glob("csrc/cpu/*.cpp")),
        depends=sorted(glob.glob("csrc/cpu/*.h")),
        extra_compile_args={"cxx": flags},
        py_limited_api=True,
    )


def supported():
    return sys.platform in ("linux", "darwin") and sysconfig.get_config_var("EXT_SUFFIX") is not None


setup(
    ext_modules=[native()] if supported() else [],
    cmdclass={"build_ext": OptionalBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
