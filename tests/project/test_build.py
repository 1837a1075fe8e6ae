"""Installation with a compiler, without one, and when skipping or requiring the C++ library."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from muse_fast.ops import backends

ROOT = Path(__file__).parents[2]
MODULE = f"muse_fast/_jpeg{sysconfig.get_config_var('EXT_SUFFIX')}"
SOURCES = ["setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "csrc", "kernels", "muse_fast"]


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return copy_of_the_checkout(tmp_path)


def copy_of_the_checkout(folder: Path) -> Path:
    """Copy the sources as in a clean checkout."""
    copy = folder / "checkout"
    copy.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


def pip(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "-v", *arguments, "--no-deps", "--no-build-isolation", "--no-index"]
    return subprocess.run(
        command,
        cwd=checkout,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        start_new_session=True,  # no terminal, so that the message of a failed build is in the output
    )


def wheel_contents(checkout: Path) -> set[str]:
    (wheel,) = checkout.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def wheel_without_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel as built without a compiler."""
    sources = copy_of_the_checkout(tmp_path_factory.mktemp("without_library"))
    finished = pip(sources, "wheel", ".", CXX="/no/such/compiler")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "C++ library not built" in finished.stdout + finished.stderr
    (built,) = sources.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel as built without nvcc, which takes longest to compile."""
    sources = copy_of_the_checkout(tmp_path_factory.mktemp("wheel"))
    finished = pip(sources, "wheel", ".", MUSE_FAST_BUILD="require", CUDACXX="/no/such/nvcc")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "CUDA sources: skipped" in finished.stdout + finished.stderr
    (built,) = sources.glob("*.whl")
    return built


@pytest.mark.slow
def test_wheel_contains_what_a_run_needs_and_nothing_else(wheel_without_library: Path) -> None:
    """Without a compiler, the installation continues without the C++ libraries."""
    assert_contents(wheel_without_library)


@pytest.mark.heavy
@needs_compiler
def test_wheel_contains_the_libraries(wheel: Path) -> None:
    assert_contents(wheel, "muse_fast/_C.so", MODULE)


def assert_contents(wheel: Path, *libraries: str) -> None:
    contents = set(zipfile.ZipFile(wheel).namelist())
    folders = {"muse_fast": wheel.parent / "muse_fast", "muse_fast/kernels": wheel.parent / "kernels"}
    files = {f"{name}/{path.relative_to(folder)}" for name, folder in folders.items() for path in folder.rglob("*.py")}
    data = [*folders["muse_fast"].glob("configs/*.yaml"), *folders["muse_fast"].glob("finders/weights/*")]
    files |= {str(path.relative_to(wheel.parent)) for path in data}
    files |= {"muse_fast/py.typed", *libraries}
    assert {"muse_fast/configs/demo.yaml", "muse_fast/finders/weights/nuclei_resnet18.safetensors"} <= files
    assert {name for name in contents if ".dist-info/" not in name} == files


@pytest.mark.parametrize(
    ("built", "library"),
    [
        pytest.param(
            "wheel_without_library",
            "cut in Python: muse_fast/_jpeg was not built",
            marks=pytest.mark.slow,
            id="without",
        ),
        pytest.param("wheel", "loaded from {}/muse_fast/_C.so", marks=[pytest.mark.heavy, needs_compiler], id="with"),
    ],
)
def test_installed_from_the_wheel_it_prepares_and_trains(
    built: str, library: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Use an environment with the dependencies of this one but without its muse_fast, outside the checkout."""
    wheel: Path = request.getfixturevalue(built)
    environment = tmp_path / "venv"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    finished = pip(tmp_path, "--python", str(python), "install", str(wheel))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    # Python searches a folder named in a .pth file for packages, but does not read the .pth files in it, such as that
    # of an editable installation.
    installed = sysconfig.get_path("purelib", vars={"base": str(environment)})
    Path(installed, "dependencies.pth").write_text(str(Path(torch.__file__).parents[1]))

    def run(*command: str) -> str:
        variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"COLUMNS": "300"}
        command = (str(environment / "bin" / command[0]), *command[1:])
        finished = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return finished.stdout

    assert run("python", "-c", "import muse_fast; print(muse_fast.__file__)").startswith(installed)
    assert library.format(installed) in run("muse-fast", "doctor")
    run("muse-fast", "prepare", "synthetic:2", "rois", "size=512")
    settings = ("data.roiset=rois", "train.device=cpu", "optim.steps=2", "optim.warmup_steps=1", "optim.batch_size=2")
    run("muse-fast", "pretrain", "--config", "demo", "--out", "run", *settings)
    assert (tmp_path / "run/checkpoints/step-00000002/MANIFEST.json").is_file()


@pytest.mark.heavy
def test_without_a_compiler_a_required_build_fails(checkout: Path) -> None:
    finished = pip(checkout, "wheel", ".", CXX="/no/such/compiler", MUSE_FAST_BUILD="require")
    assert finished.returncode != 0
    assert "/no/such/compiler" in finished.stdout + finished.stderr


@pytest.mark.heavy
@needs_compiler
def test_without_nvcc_the_library_has_no_cuda(wheel: Path) -> None:
    library = zipfile.ZipFile(wheel).read("muse_fast/_C.so")
    assert b"match_nuclei" in library
    assert b".nv_fatbin" not in library
    assert b"libtorch_cuda" not in library


@pytest.mark.heavy
@needs_compiler
def test_without_python_headers_only_the_module_is_skipped(checkout: Path) -> None:
    arguments = "-DPYTHON_INCLUDE_DIR=/no/such/folder -DMUSE_FAST_CUDA=OFF"
    finished = pip(checkout, "wheel", ".", MUSE_FAST_BUILD="require", CMAKE_ARGS=arguments)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "_jpeg: skipped, no Python.h in '/no/such/folder'" in finished.stdout + finished.stderr
    assert wheel_contents(checkout) & {"muse_fast/_C.so", MODULE} == {"muse_fast/_C.so"}


def test_editable_installation_finds_the_kernels(checkout: Path, tmp_path: Path) -> None:
    """``muse_fast.kernels`` is outside ``muse_fast/``; an old library must not survive a skipped build."""
    for name in ("muse_fast/_C.so", MODULE):
        (checkout / name).write_bytes(b"stale")
    target = tmp_path / "site"
    finished = pip(checkout, "install", "--target", str(target), "-e", ".", MUSE_FAST_BUILD="0")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert not (checkout / "muse_fast" / "_C.so").exists() and not (checkout / MODULE).exists()
    code = f"import site; site.addsitedir({str(target)!r}); "
    code += "from importlib.util import find_spec; print(find_spec('muse_fast.kernels').origin)"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-S", "-c", code]  # -S: ignore this environment's own muse_fast
    shown = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert shown.stdout.strip() == str(checkout / "kernels" / "__init__.py"), shown.stderr


@pytest.mark.skipif(backends.library_error() is not None, reason=str(backends.library_error()))
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_library_needs_no_python_and_only_the_stable_interface() -> None:
    symbols = subprocess.run(["nm", "-D", "-C", "--undefined-only", backends.LIBRARY], capture_output=True, text=True)
    names = [line.split(maxsplit=1)[1] for line in symbols.stdout.splitlines() if line.split()[0] == "U"]
    assert any("aoti_torch" in name for name in names)
    assert not [name for name in names if name.startswith(("_Py", "Py", "c10::", "at::", "torch::"))]


@pytest.mark.skipif(backends.library_error() is not None, reason=str(backends.library_error()))
@pytest.mark.skipif(shutil.which("nvcc") is None or torch.version.cuda is None, reason="no nvcc, or torch without CUDA")
def test_library_contains_cuda_code_and_needs_no_cuda_runtime() -> None:
    """It has machine code for sm_80 and sm_90, PTX for later GPUs, and the runtime linked statically."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key("muse_fast::match_nuclei", "CUDA")
    knobs = pytest.importorskip("triton.knobs")  # Triton ships cuobjdump
    command = [knobs.nvidia.cuobjdump.path, "--list-elf", "--list-ptx", backends.LIBRARY]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"sm_\d+\w*\.(?:cubin|ptx)", listed)) == {"sm_80.cubin", "sm_90.cubin", "sm_90.ptx"}
    assert b"libcudart.so" not in backends.LIBRARY.read_bytes()
