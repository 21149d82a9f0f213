"""Settings for all tests: one thread, fixed seeds, examples of hypothesis that can be repeated.

torch's other defaults, the precision of float32 products among them, stay as a user finds them.
"""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

import reparam
from passes.blocks.kit.registry import unregister
from passes.training import equivalent

# No deadline: the first call of a torch operation is slow. In CI the same examples every time.
settings.register_profile("dev", deadline=None, print_blob=True)
settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed torch and random before every test."""
    random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture
def registry() -> Iterator[None]:
    """Forget the blocks that a test registers."""
    known = set(reparam.blocks())
    yield
    for name in set(reparam.blocks()) - known:
        unregister(name)
    assert set(reparam.blocks()) == known


def pytest_configure(config: pytest.Config) -> None:
    """Keep recorded kernels, under the same keys: recording is most of what tests of online blocks would do.

    The library forgets them with the last block that runs them. Where coverage asks which test runs which line, each
    test records its own.
    """
    if not config.getoption("cov_context", None):
        equivalent._PROGRAMS = {}  # type: ignore[assignment]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Let the collector of garbage leave out what the libraries hold: tracing calls it, each time for half a second."""
    if hasattr(session.config, "workerinput"):  # one of the long runs, which load this sooner or later
        import torch._dynamo  # noqa: F401
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
