"""Fixtures of all tests."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from tests.support.ranks import Ranks

if not torch.cuda.is_available():  # set before kernels are imported: Triton reads it when it decorates them
    os.environ.setdefault("TRITON_INTERPRET", "1")
# `make test` tries the same examples every time; `make test-heavy` searches at random (--hypothesis-profile=search).
# Add what that finds as an @example to its test.
settings.register_profile("fixed", max_examples=200, deadline=None, derandomize=True, database=None)
settings.register_profile("search", max_examples=5_000, deadline=None)
settings.load_profile("fixed")
torch.backends.cudnn.allow_tf32 = False  # its rounding is coarser than the tolerances of float32
torch.set_num_threads(1)  # same sums on every machine, and tests in parallel do not compete for cores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files with the most slow tests first, so that parallel workers end at about the same time."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same random state, whatever the order of the tests."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Allow only deterministic algorithms, and fill ``torch.empty`` with NaN, so that reading it is noticed."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def thin() -> Iterator[None]:
    """Thin networks in place of ``vit_tiny`` and ``resnet50``."""
    from tests.support.thin import thin_networks  # it imports timm, which takes seconds

    with thin_networks():
        yield


@pytest.fixture
def without_pictures() -> Iterator[None]:
    """Runs of ``pretrain`` draw no pictures of their results."""
    from tests.support import toy_runs  # it imports the whole engine

    with toy_runs.without_pictures():
        yield


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two processes that run functions as ranks 0 and 1."""
    ranks = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real H&E images: ``$MUSE_FAST_DATA``, or ``shared/data`` next to the checkout."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("MUSE_FAST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}; set MUSE_FAST_DATA")
    return folder
