"""What every test shares: a cache of its own, so that no test sees or leaves anything in the user's."""

import gc
import os
from pathlib import Path

import pytest
from hypothesis import settings

# No deadline: a compiled function's first call takes seconds. The same examples every time: a failure fails again.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")

REPOSITORY = Path(__file__).resolve().parent.parent

# Compiled code is kept from run to run: it is valid for the sources it was made from. numba reads this when it is
# imported; child processes inherit it.
os.environ.setdefault("NUMBA_CACHE_DIR", str(REPOSITORY / ".pytest_cache" / "compiled"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """From the last folder to the first: the longest files, which train, do not end on one core alone."""
    items.sort(key=lambda item: item.path, reverse=True)


def pytest_collection_finish() -> None:
    """What was imported stays: collections of garbage need not go through it, which takes them almost a second each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The top of the source tree."""
    return REPOSITORY


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory):
    """Packed images and token caches go to a folder that ends with the session; child processes inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STL_OFFLINE_CACHE", str(tmp_path_factory.mktemp("stl-offline-cache")))
        patch.setenv("STL_OFFLINE_QUIET", "1")
        yield
