"""Another attribute for a module or class of a library, for a while: where a library has no hook of its own.

Whoever swaps says beside it why nothing less will do.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Let a module or class have `value` for an attribute inside, and what it had before afterwards.

    Args:
        owner: The module or class that defines the attribute itself; one that inherits it is left alone.
        name: The attribute.
        value: What takes its place.

    Raises:
        AttributeError: The owner does not define it: another version of the library does it elsewhere.
    """
    if name not in vars(owner):
        raise AttributeError(f"{owner.__name__} does not define {name}, which was to be swapped")
    before = vars(owner)[name]  # not getattr: that would unwrap a static or class method
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
