"""OpenMP's threads sleep while they wait, unless the user decides otherwise."""

import os
import subprocess
import sys

import pytest

SHOW = "import muse_fast, torch; torch.ones(1)"


@pytest.mark.skipif(sys.platform != "linux", reason="torch brings GNU's OpenMP only on Linux")
def test_openmp_of_torch_waits_passively() -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    found = subprocess.run(
        [sys.executable, "-c", SHOW],
        env={**environment, "OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in found.stderr
    assert "GOMP_SPINCOUNT = '0'" in found.stderr


def test_the_environment_of_the_user_counts() -> None:
    show = "import os, muse_fast; print(os.environ['OMP_WAIT_POLICY'])"
    environment = {**os.environ, "OMP_WAIT_POLICY": "active"}
    found = subprocess.run([sys.executable, "-c", show], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout == "active\n"
