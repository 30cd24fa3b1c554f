"""Rows encoded chunk by chunk: in this process where they are few, else by a process for each core.

Most of the time goes into rendering templates and looking for answers, which is Python: threads would not help. The
processes import no torch and are not forked, since this one may have threads and a card already.
"""

import os
import pickle
import queue
import struct
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any, Literal, cast

import numpy as np

from studio.core.errors import BadInput, JobFailed, StudioError
from studio.jobs.base.data.labels import IGNORED
from studio.jobs.base.data.row_report import RowReport
from studio.jobs.base.data.rows import Encoder, Example
from studio.jobs.base.data.stored_examples import Packed
from studio.probe.data import Preference, Row
from studio.probe.data.stored_rows import unpacked
from studio.probe.data.views import lines_of

CHUNK_ROWS = 256
"""Rows that are tokenised in one call; progress is told after each call."""
CHUNK_BYTES = 2**20
"""Rows of so many bytes are a chunk, however few they are: their tokens are in memory together."""
ALONE_BYTES = 8 * 2**20
"""Fewer bytes of rows are encoded in this process, in about ten seconds: others take some to start."""
_MOST_PROCESSES = 16
_AHEAD = 3
"""Chunks that are given to each process before the first one is taken back."""
_WORKER = "studio.jobs.base.data.encode_worker"
_POLL_SECONDS = 0.3
_SIZE = struct.Struct("<Q")

Method = Literal["encode", "sides"]
"""Of an encoder: `encode` for the examples of each row, `sides` for those of both sides of pairs."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What became of a chunk of rows.

    Attributes:
        packed: Their examples; of each pair the chosen and the rejected side.
        report: What happened to the rows.
        left_out: How many pairs are left out, by reason (`studio.core.left_out`).
    """

    packed: Packed
    report: RowReport
    left_out: Counter[str]


def encoded_chunks(
    rows: Sequence[Row],
    size_bytes: int,
    encoder: Encoder,
    method: Method = "encode",
    progress: Callable[[float], None] | None = None,
) -> Iterator[Chunk]:
    """Yield what an encoder makes of all rows, a chunk at a time, in order.

    Args:
        rows: Any rows.
        size_bytes: How large they are, about.
        encoder: Encodes them.
        method: Which of its methods is meant.
        progress: Told the fraction done, 0 to 1, about three times a second; may raise to end it.

    Raises:
        JobFailed: The encoder says so, or a process has died.
        BadInput: The encoder says so.
    """
    processes = min(_MOST_PROCESSES, cores(), size_bytes // ALONE_BYTES + 1)
    with_own_code = type(encoder.tokenizer).__module__.startswith("transformers_modules")
    if size_bytes < ALONE_BYTES or processes < 2 or with_own_code:
        made = _alone(rows, encoder, method)
    else:
        made = _Pool(encoder, method, processes).made(rows, progress)
    done = 0
    for count, answer in made:
        done += count
        yield answer
        if progress:
            progress(done / max(1, len(rows)))


def cores() -> int:
    """Return how many processors this process may use."""
    with suppress(AttributeError):  # only Linux has it
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _chunks(rows: Sequence[Row]) -> Iterator[tuple[int, bytes]]:
    """Yield (number of rows, rows as they are stored)."""
    lines, size = list[bytes](), 0
    for line in lines_of(rows):
        lines.append(line)
        size += len(line)
        if len(lines) == CHUNK_ROWS or size >= CHUNK_BYTES:
            yield len(lines), b"".join(lines)
            lines, size = [], 0
    if lines:
        yield len(lines), b"".join(lines)


def encoded(encoder: Encoder, method: Method, rows: Sequence[Row]) -> Chunk:
    """Return what becomes of some rows; for `sides` they are preferences."""
    left_out: Counter[str] = Counter()
    if method == "encode":
        of_rows, report = encoder.encode(rows)
        return Chunk(Packed.of([example for of_row in of_rows for example in of_row]), report, left_out)
    of_pairs, report = encoder.sides(cast(Sequence[Preference], rows))
    examples = list[Example]()
    for chosen, rejected in of_pairs:
        why = _why_unpaired(chosen, rejected)
        if why:
            left_out[why] += 1
        else:
            examples += (chosen[0], rejected[0])
    return Chunk(Packed.of(examples), report, left_out)


def _why_unpaired(chosen: Sequence[Example], rejected: Sequence[Example]) -> str:
    """Return why the examples of both sides are no pair; empty where they are."""
    if not chosen or not rejected:
        return "side_left_out"
    if len(chosen) > 1 or len(rejected) > 1:
        return "side_split"
    one, other = (side[0].input_ids[: int(np.argmax(side[0].labels != IGNORED))] for side in (chosen, rejected))
    return "" if np.array_equal(one, other) else "prompts_differ"


def answer(encoder: Encoder, method: Method, lines: bytes) -> tuple[str, Any]:
    """Return `made` with what becomes of some stored rows, or `failed` with the error as class and words."""
    try:
        return "made", encoded(encoder, method, _rows(lines))
    except JobFailed as error:
        return "failed", ("JobFailed", (error.kind, str(error), error.advice))
    except StudioError as error:
        return "failed", ("BadInput", (str(error),))


def _rows(lines: bytes) -> list[Row]:
    return [unpacked(line) for line in lines.split(b"\n")[:-1]]


def _alone(rows: Sequence[Row], encoder: Encoder, method: Method) -> Iterator[tuple[int, Chunk]]:
    if isinstance(rows, tuple | list):
        for start in range(0, len(rows), CHUNK_ROWS):
            chunk = list(rows[start : start + CHUNK_ROWS])
            yield len(chunk), encoded(encoder, method, chunk)
        return
    for count, lines in _chunks(rows):
        yield count, encoded(encoder, method, _rows(lines))


def read_frame(file: IO[bytes]) -> bytes | None:
    """Return the bytes that `write_frame` has written at the other end; None at its end."""
    head = file.read(_SIZE.size)
    if len(head) < _SIZE.size:
        return None
    (size,) = _SIZE.unpack(head)
    data = file.read(size)
    return data if len(data) == size else None


def write_frame(file: IO[bytes], data: bytes) -> None:
    """Write bytes with their number before them.

    Raises:
        OSError: The other end is closed.
    """
    file.write(_SIZE.pack(len(data)))
    file.write(data)
    file.flush()


class _Pool:
    """Processes that encode; a thread for each talks to it."""

    def __init__(self, encoder: Encoder, method: Method, processes: int) -> None:
        self._begin = pickle.dumps((encoder, method), pickle.HIGHEST_PROTOCOL)
        self._count = processes
        self._processes: list[_Process] = []
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()

    def made(self, rows: Sequence[Row], progress: Callable[[float], None] | None) -> Iterator[tuple[int, Chunk]]:
        """Yield (number of rows, what was made of them) in order."""
        threads = ThreadPoolExecutor(self._count, "encode")
        chunks, done = _chunks(rows), 0
        waiting: deque[tuple[int, Future[Chunk]]] = deque()
        try:
            for _ in range(self._count):
                self._processes.append(_Process(self._begin))
                self._idle.put(self._processes[-1])
            while True:
                room = _AHEAD * self._count - len(waiting)
                waiting.extend((count, threads.submit(self._ask, lines)) for count, lines in islice(chunks, room))
                if not waiting:
                    return
                count, first = waiting.popleft()
                while not wait((first,), _POLL_SECONDS).done:
                    if progress:
                        progress(done / len(rows))
                done += count
                yield count, first.result()
        finally:
            for process in self._processes:
                process.end()  # a thread that waits for its answer is freed by that
            threads.shutdown(cancel_futures=True)
            for process in self._processes:
                process.close()

    def _ask(self, lines: bytes) -> Chunk:
        process = self._idle.get()
        try:
            return process.ask(lines)
        finally:
            self._idle.put(process)


class _Process:
    """One process that encodes, as seen by the thread that talks to it."""

    def __init__(self, begin: bytes) -> None:
        # One thread each: there is a process for each core.
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-P", "-m", _WORKER]
        self._begin = begin
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def ask(self, lines: bytes) -> Chunk:
        """Return what is made of a chunk.

        Raises:
            JobFailed: The encoder says so, or the process has died.
            BadInput: The encoder says so.
        """
        into, out = self._process.stdin, self._process.stdout
        if into is None or out is None:
            raise AssertionError("it is started with both pipes")
        data = None
        with suppress(OSError, ValueError):  # it has died, or is ended and closed
            if self._begin:
                write_frame(into, self._begin)
                self._begin = b""
            write_frame(into, lines)
            data = read_frame(out)
        if data is None:
            raise JobFailed(
                "encoder_died",
                f"A process that turns rows into tokens has ended (exit code {self._process.wait()}).",
                "Look at the end of output.log. If memory was short, close other programs and resume the run.",
            )
        word, found = pickle.loads(data)  # noqa: S301  from a process that was started here
        if word == "made":
            chunk: Chunk = found
            return chunk
        kind, words = found
        raise JobFailed(*words) if kind == "JobFailed" else BadInput(*words)

    def end(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()

    def close(self) -> None:
        """Collect what is left of it."""
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # what was not sent any more
                if pipe:
                    pipe.close()
