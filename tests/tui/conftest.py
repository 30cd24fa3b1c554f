import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def searched_once() -> Iterator[None]:
    """Look for garbage between the tests only: an app is 350 000 objects, and walking them took half of the time."""
    gc.disable()
    yield
    gc.enable()
