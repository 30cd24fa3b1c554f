"""What the parts of an Arrow file unpack to, as they say themselves, before one is unpacked.

pyarrow takes as much memory as a compressed buffer claims to need and does not show the claim. It stands before each
buffer, and where the buffers are stands in the message's header, a flatbuffer (Arrow's `format/Message.fbs`).
"""

import struct
from collections.abc import Iterator
from typing import Any

ARROW_MAGIC = b"ARROW1"
_RECORD_BATCH, _DICTIONARY_BATCH = 3, 2
_MOST_BUFFERS = 1_000_000


def part_sizes(source: Any) -> Iterator[int]:
    """Yield for each batch of an Arrow file or stream how many bytes its buffers take when they are unpacked.

    Args:
        source: The open file, read from its beginning.

    Raises:
        struct.error: A header points outside of itself.
        pa.ArrowException, OSError: The file breaks off.
    """
    import pyarrow as pa  # noqa: PLC0415  0.2 s that only readers of its files pay

    # A file is a stream between magic words; the first takes eight bytes.
    source.seek(8 if source.read(6) == ARROW_MAGIC else 0)
    messages = pa.ipc.MessageReader.open_stream(source)
    while True:
        try:
            message = messages.read_next_message()
        except StopIteration:
            return
        yield _unpacked_bytes(message.metadata.to_pybytes(), message.body)


def _unpacked_bytes(header: bytes, body: Any) -> int:
    (root,) = struct.unpack_from("<I", header)
    (kind,) = struct.unpack_from("<B", header, at) if (at := _field(header, root, 1)) else (0,)
    table = _inner(header, root, 2)
    if kind == _DICTIONARY_BATCH and table:
        table = _inner(header, table, 1)
    if kind not in (_RECORD_BATCH, _DICTIONARY_BATCH) or not table:
        return 0
    packed = bool(_field(header, table, 3))
    place = _inner(header, table, 2)
    if not place:
        return 0
    (many,) = struct.unpack_from("<I", header, place)
    if many > _MOST_BUFFERS:
        raise struct.error(f"{many} buffers in one batch")
    total = 0
    for number in range(many):
        offset, length = struct.unpack_from("<qq", header, place + 4 + 16 * number)
        unpacked = length
        if packed and length >= 8 and 0 <= offset <= len(body) - 8:
            (claimed,) = struct.unpack("<q", body[offset : offset + 8])
            unpacked = length - 8 if claimed == -1 else claimed
        total += max(0, unpacked)
    return total


def _field(header: bytes, table: int, number: int) -> int:
    """Return where a field of a table lies; 0 where it is left out."""
    (back,) = struct.unpack_from("<i", header, table)
    vtable = table - back
    if vtable < 0:
        raise struct.error("a table before the header")
    (size,) = struct.unpack_from("<H", header, vtable)
    entry = 4 + 2 * number
    if entry + 2 > size:
        return 0
    (offset,) = struct.unpack_from("<H", header, vtable + entry)
    return table + offset if offset else 0


def _inner(header: bytes, table: int, number: int) -> int:
    """Return where the table or list begins to which a field points; 0 where it is left out."""
    if not (at := _field(header, table, number)):
        return 0
    (offset,) = struct.unpack_from("<I", header, at)
    return int(at + offset)
