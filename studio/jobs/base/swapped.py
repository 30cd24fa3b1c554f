"""Replaces an attribute of a library's module or class for a while, where the library has no hook of its own.

Each use says in a comment why nothing less will do.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of a module or class to `value` inside the context, and restore it afterwards.

    Args:
        owner: The module or class that defines the attribute itself; one that only inherits it is refused.
        name: The attribute.
        value: What takes its place.

    Raises:
        AttributeError: The owner does not define it; another version of the library may define it elsewhere.
    """
    if name not in vars(owner):
        raise AttributeError(f"{owner.__name__} does not define {name}, which was to be swapped")
    before = vars(owner)[name]  # not getattr: that would unwrap a static or class method
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
