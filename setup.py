"""Builds the C++ libraries through CMake; metadata is in pyproject.toml, flags and sources are in CMakeLists.txt.

Without a compiler, without torch in the build environment, or if the build fails, the installation continues in pure
Python and says so, and ``python -m muse_fast.doctor`` says it too. ``MUSE_FAST_BUILD=require`` makes a failure fatal,
``MUSE_FAST_BUILD=0`` skips the build. ``CMAKE_ARGS`` is passed to CMake unchanged. If Python's headers or pybind11 are
missing, only ``muse_fast/_jpeg`` is skipped.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

if (
    int(setuptools.__version__.split(".")[0]) < 77
):  # --no-build-isolation does not look at pyproject.toml's build-system
    raise SystemExit(f"muse_fast builds with setuptools>=77, found {setuptools.__version__}; pip install -U setuptools")

ROOT = Path(__file__).parent
LIBRARY = "muse_fast._C"  # loaded by torch
MODULE = "muse_fast._jpeg"  # imported by Python


class CMakeBuild(build_ext):
    """Run CMake and put the libraries where setuptools expects the extensions."""

    def run(self) -> None:
        mode = os.environ.get("MUSE_FAST_BUILD", "auto")
        if mode not in ("auto", "require", "0"):
            raise SystemExit(f"MUSE_FAST_BUILD={mode}: expected auto, require or 0")
        for folder in [self.build_lib, *([ROOT] if self.inplace else [])]:
            for name in (LIBRARY, MODULE):  # an older build must not be taken for this one
                Path(folder, self.get_ext_filename(name)).unlink(missing_ok=True)
        if mode == "0":
            announce("skipped (MUSE_FAST_BUILD=0)")
            return
        try:
            super().run()
        except (ImportError, OSError) as error:
            if mode == "require":
                raise
            announce(f"not built ({error}; MUSE_FAST_BUILD=require shows more)")

    def build_extensions(self) -> None:
        build = run_cmake()
        for ext in self.extensions:
            target = Path(self.get_ext_fullpath(ext.name)).resolve()
            built = build / target.name
            if ext.name == MODULE and not built.exists():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(built, target)

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith("_C"):  # with or without its package; not imported, so no Python ABI in the name
            return str(Path(*fullname.split(".")).with_suffix(".so"))
        return super().get_ext_filename(fullname)


def run_cmake() -> Path:
    """Build all targets and return the build folder."""
    from torch.utils.cpp_extension import include_paths, library_paths

    build = ROOT / "build" / "cmake"
    # The cmake and ninja of pip are in the folder of this Python, which may not be on PATH.
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    cmake = shutil.which("cmake", path=path)
    if cmake is None:
        raise FileNotFoundError("cmake not found; pip install cmake ninja")
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "TORCH_INCLUDE_DIRS": ";".join(include_paths()),
        "TORCH_LIBRARY_DIRS": ";".join(library_paths()),
        "PYTHON_INCLUDE_DIR": sysconfig.get_path("include"),
        "PYTHON_MODULE_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
        "PYBIND11_INCLUDE_DIR": pybind11_folder(),
    }
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=path) else []
    defines = [f"-D{name}={value}" for name, value in settings.items()]
    defines += shlex.split(os.environ.get("CMAKE_ARGS", ""))
    environment = os.environ | {"PATH": path}
    shutil.rmtree(build, ignore_errors=True)  # a cache from another environment may name folders that no longer exist
    for step in (["-S", str(ROOT), "-B", str(build), *generator, *defines], ["--build", str(build), "--parallel"]):
        if subprocess.run([cmake, *step], env=environment).returncode:
            raise OSError(f"cmake {step[0]} failed")
    return build


def pybind11_folder() -> str:
    """Folder of the headers of pybind11; empty if it is not installed."""
    try:
        import pybind11
    except ImportError:
        return ""
    return pybind11.get_include()


def announce(message: str) -> None:
    """Print a message to the terminal too: pip hides the output of a successful build."""
    text = f"muse_fast: C++ library {message}. Pure Python installation; see `python -m muse_fast.doctor`.\n"
    sys.stderr.write(text)
    with contextlib.suppress(OSError):  # no terminal
        Path("/dev/tty").write_text(text)


setup(
    # kernels/ depends only on torch and triton, so that the folder can be copied out of the checkout. It is installed
    # as muse_fast.kernels, because PyPI has another package called "kernels".
    packages=[
        *find_packages(include=["muse_fast", "muse_fast.*"]),
        "muse_fast.kernels",
        "muse_fast.kernels.blocked",
        "muse_fast.kernels.fused",
    ],
    package_dir={"muse_fast.kernels": "kernels"},
    ext_modules=[Extension(name, sources=[], optional=True) for name in (LIBRARY, MODULE)],
    cmdclass={"build_ext": CMakeBuild},
)
