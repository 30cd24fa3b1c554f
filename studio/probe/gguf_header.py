"""Reads what a GGUF file says of its model, without reading a weight.

The gguf library first builds every one of the 100 000 tokenizer strings, which takes 2.3 s for the embedded model. This
module skips them and takes some 30 ms: the terminal waits for it. Layout: ggml's `docs/gguf.md`, versions 2 and 3.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio.core.errors import BadInput
from studio.core.text import plain

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_ENTRIES = 1_000_000
_MOST_DIMENSIONS = 8


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Scalar metadata by key (arrays are left out) and the shapes of the tensors by name."""

    metadata: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]

    @property
    def parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def read_gguf_header(path: Path) -> GgufHeader:
    """Return the metadata and tensor shapes of a GGUF file.

    Raises:
        BadInput: The file cannot be read, is no GGUF file, or is cut.
    """
    name = plain(path.name, one_line=True)
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return _Cursor(view).header()
    except (struct.error, ValueError, UnicodeDecodeError, IndexError) as error:
        raise BadInput(
            f"{name} is no whole GGUF file ({plain(str(error), one_line=True)}). Install it again."
        ) from None
    except OSError as error:
        raise BadInput(f"{name} cannot be read: {error.strerror or error}.") from None


class _Cursor:
    """A position in the file; `struct` checks that no read goes beyond the file's end."""

    def __init__(self, view: mmap.mmap) -> None:
        self.view = view
        self.at = 0

    def header(self) -> GgufHeader:
        if self.view[:4] != b"GGUF":
            raise ValueError("it does not start with GGUF")
        self.at = 4
        version, tensors, entries = self.take("I"), self.take("Q"), self.take("Q")
        if version not in (2, 3):
            raise ValueError(f"version {version}; known are 2 and 3")
        if tensors > _MOST_ENTRIES or entries > _MOST_ENTRIES:
            raise ValueError(f"{tensors} tensors and {entries} entries cannot be")
        metadata = {}
        for _ in range(entries):
            key, kind = self.string(), self.take("I")
            if kind == _ARRAY:
                self.skip_array(depth=0)
            else:
                metadata[key] = self.string() if kind == _STRING else self.scalar(kind)
        shapes = {}
        for _ in range(tensors):
            name, dimensions = self.string(), self.take("I")
            if dimensions > _MOST_DIMENSIONS:
                raise ValueError(f"a tensor with {dimensions} dimensions")
            shapes[name] = tuple(self.take("Q") for _ in range(dimensions))
            self.move(self.at + 4 + 8, "its list of tensors")  # type and offset
        return GgufHeader(metadata, shapes)

    def take(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.view, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def scalar(self, kind: int) -> Any:
        if kind not in _SCALARS:
            raise ValueError(f"unknown value type {kind}")
        return self.take(_SCALARS[kind])

    def move(self, to: int, inside: str) -> int:
        """Move to a position in the file and return the one before."""
        if to > len(self.view):
            raise ValueError(f"it ends inside {inside}")
        start, self.at = self.at, to
        return start

    def string(self) -> str:
        length = self.take("Q")
        start = self.move(self.at + length, "a text")
        return self.view[start : self.at].decode("utf-8")

    def skip_array(self, depth: int) -> None:
        kind, count = self.take("I"), self.take("Q")
        if kind in _SCALARS:
            self.move(self.at + count * struct.calcsize(f"<{_SCALARS[kind]}"), "a list")
        elif kind == _STRING:
            at, view, end, length_at = self.at, self.view, len(self.view), struct.Struct("<Q").unpack_from
            for _ in range(count):
                at += 8 + length_at(view, at)[0]
                if at > end:
                    break
            self.move(at, "a list of texts")
        elif kind == _ARRAY and depth < _MOST_DIMENSIONS:
            for _ in range(count):
                self.skip_array(depth + 1)
        else:
            raise ValueError(f"unknown array type {kind}")
