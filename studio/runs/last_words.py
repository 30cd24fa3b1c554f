"""Why a process ended without a terminal event: read from the last lines that it printed.

Native code can end a process without a Python exception (bitsandbytes prints a line and calls `exit(1)`, csrc/common.h;
a fault in a kernel's host code is a signal), so that no event says why. What was printed is in `output.log`, where any
process that looks at the run can read it.
"""

import math
import re
from pathlib import Path

from studio.core.errors import JobFailed
from studio.core.text import plain
from studio.runs.disk import RESUME
from studio.runs.failure import OUT_OF_MEMORY, Doing, memory_failure_of, out_of_memory_in
from studio.runs.history import History
from studio.runs.layout import RunPaths
from studio.runs.memory_kills import ALMOST_FULL, MEMORY_KILLS, kills_since
from studio.runs.native import native_failure
from studio.runs.process import of_this_boot, read_mark

CRASHED = "crashed"
"""The kind of a failure whose reason is not known."""

_KILLER = "the system's out-of-memory killer has ended a process since this one began, and this one is gone"
_GUARD = (
    "the process ended without a word while hardly any memory was left, as when a guard of it (earlyoom, systemd-oomd) "
    "ends it"
)
_SHORTLY_SECONDS = 60.0
"""How long before a process's last event memory must have been told to be almost full."""
_MORE_MEMORY = "close other programs, or give the container, batch job or machine more memory"
_TAIL_BYTES = 64 * 1024
_LAST_LINES = 20
"""How many lines from the end a reason may stand: after older lines the process went on."""
_LONGEST = 300

_FATAL = re.compile(r"^Fatal Python error: (.+)")
_TIMER = re.compile(r"^Timeout \(\d+:\d\d:\d\d(\.\d+)?\)!")
_TEMPLATE = "in apply_template"
_FRAME = re.compile(r'^  File "(.+)", line (\d+) in (\S+)')
_EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit)\b(:|$)")
_KILLED = re.compile(r"^Killed$|oom-kill|Out of memory: Killed process|Memory cgroup out of memory")
_CUBLAS_ALLOC_FAILED = re.compile(r"(CUBLAS ERROR: Status|API failed with status) 3\b")
_ON_CARD = re.compile(r"cuda|cublas|cudnn|^Error .+ at line \d+ in file", re.IGNORECASE)

_THEN = f"then continue with: {RESUME}"
_SIGNALS = {
    "segmentation fault": "{then}. If it comes back, update the library that is named; device.device = cpu, another "
    "train.attention or another train.optimizer narrow it down",
    "bus error": "a file that was mapped into memory was cut, or lies on a full disk (/dev/shm is one): look at df -h, "
    "{then}",
    "illegal instruction": "the processor lacks an instruction that an installed library was built with: install a "
    "build for it",
}
"""What to do, by the name of the signal in what Python's fault handler prints."""
_ABORTED = "the lines before it in output.log say more; {then}"


def crash_of(paths: RunPaths, history: History) -> JobFailed | None:
    """Return why a run's process ended without a terminal event; None where the last lines it printed do not tell.

    Args:
        paths: The run, which has crashed.
        history: Its events: advice depends on what the job was doing.
    """
    job = history.started.job if history.started else ""
    doing = Doing(job, history.phase.name if history.phase else "")
    go_on = RESUME.replace("RUN", plain(paths.name, one_line=True))
    found = reason_in(printed_since_launch(paths), doing, then=f"then continue with: {go_on}")
    if (found is None or found.kind == CRASHED) and memory_kills(paths):
        full = memory_failure_of(f"{_KILLER}{_held(history)}", doing, on_card=False)
        found = JobFailed(full.kind, str(full), f"{_MORE_MEMORY}; {full.advice}")
    if found is None and (low := _low_memory(history)):
        full = memory_failure_of(f"{_GUARD}; {low}", doing, on_card=False)
        found = JobFailed(full.kind, str(full), f"{_MORE_MEMORY}; {full.advice}")
    return found and JobFailed(found.kind, str(found), found.advice.replace(RESUME, go_on))


def kind_of_crash(paths: RunPaths) -> str:
    """Return the kind of failure of a crashed run, for a list of runs."""
    found = reason_in(printed_since_launch(paths), Doing())
    kind = found.kind if found else CRASHED
    return OUT_OF_MEMORY if kind == CRASHED and memory_kills(paths) else kind


def memory_kills(paths: RunPaths) -> int | None:
    """Return how many processes the out-of-memory killer has ended since the worker began, in its control group.

    None where it is not known: for a run on another machine, or from before this machine was started.
    """
    worker = read_mark(paths.process)
    if worker is None or not of_this_boot(worker[0]):
        return None
    before = worker[1].get(MEMORY_KILLS)
    return kills_since(before) if isinstance(before, dict) else None


def _low_memory(history: History) -> str:
    """Return what a training said of main memory if it was almost full shortly before its end; else nothing."""
    told = [event for event in history.warnings if event.topic == ALMOST_FULL]
    if not told or history.last_at is None or history.last_at - told[-1].at > _SHORTLY_SECONDS:
        return ""
    return told[-1].message.partition(";")[0]


def _held(history: History) -> str:
    """Return how much memory the process held at its last reading, in words; empty without one."""
    known = [value for value in history.memory.resident_bytes[-1:] if not math.isnan(value)]
    return f"; the process held {known[0] / 1e9:.1f} GB when it last looked" if known else ""


def printed_since_launch(paths: RunPaths) -> list[str]:
    """Return the last lines of `output.log`, 64 KiB at most, without those that an earlier process printed."""
    launched = read_mark(paths.launch)
    before = launched[1].get("output_bytes") if launched else None
    return printed_lines(paths.output, _TAIL_BYTES, before if isinstance(before, int) else 0)


def reason_in(lines: list[str], doing: Doing, *, then: str = _THEN) -> JobFailed | None:
    """Return the failure that the last lines of a process mean; None where they name none.

    A line that names a cause comes before a signal or an exception, which only tell that something went wrong.

    Args:
        lines: As printed.
        doing: What the job was doing.
        then: How to go on once the cause is removed.
    """
    if found := _endless(lines):
        return found
    fatal = next((place for place in reversed(range(len(lines))) if _FATAL.match(lines[place])), None)
    # After "Fatal Python error" come the calls of all threads, maybe hundreds of lines: a cause stands before it.
    end = len(lines) if fatal is None else fatal
    for line in reversed(lines[max(0, end - _LAST_LINES) : end]):
        if found := _specific(line, doing, then):
            return found
    if fatal is not None:
        return _fatal(lines[fatal:], then)
    return _exception(lines[-_LAST_LINES:])


def _specific(line: str, doing: Doing, then: str) -> JobFailed | None:
    if _KILLED.search(line) or out_of_memory_in(line) or _CUBLAS_ALLOC_FAILED.search(line):
        return memory_failure_of(line, doing, on_card=bool(_ON_CARD.search(line)))
    return native_failure(line, then=then)


def _endless(lines: list[str]) -> JobFailed | None:
    """Return the failure when the timer around a chat template has ended the process; None where it has not.

    The timer ends the process where Python itself can no longer interrupt the template.
    """
    timer = next((place for place in reversed(range(len(lines))) if _TIMER.match(lines[place])), None)
    if timer is None or not any(_TEMPLATE in line for line in lines[timer:]):
        return None
    return JobFailed(
        "endless_template",
        "the model's chat template did not end, in a computation that cannot be interrupted: the process was ended",
        "use the tokenizer of another copy of this model",
    )


def _fatal(lines: list[str], then: str) -> JobFailed:
    """Return the failure in what Python's fault handler printed: the signal, then every thread's calls."""
    what = _FATAL.match(lines[0])
    named = plain(what[1] if what else "", one_line=True, limit=_LONGEST)
    current = next((place for place, line in enumerate(lines) if line.startswith("Current thread")), 0)
    frame = next((found for line in lines[current:] if (found := _FRAME.match(line))), None)
    where = ""
    if frame:
        parts = re.split(r"[/\\]", frame[1])[-3:]
        where = f", called from {plain('/'.join(parts), one_line=True, limit=_LONGEST)} line {frame[2]}"
    advice = _SIGNALS.get(named.lower(), _ABORTED).format(then=then).removeprefix("then ")
    return JobFailed("native_crash", f"native code ended the process: {named}{where}", advice)


def _exception(lines: list[str]) -> JobFailed | None:
    """Return the failure in a traceback that Python printed, such as of a library that cannot be imported."""
    begins = next((p for p in reversed(range(len(lines))) if lines[p].startswith("Traceback (most recent")), None)
    if begins is None:
        return None
    last = next((line for line in reversed(lines[begins:]) if _EXCEPTION.match(line)), None)
    if last is None:
        return None
    said = plain(last, one_line=True, limit=_LONGEST)
    advice = "lora-studio doctor --imports says whether the libraries can be loaded; the traceback is in output.log"
    return JobFailed(CRASHED, f"the worker's process ended before it could say why: {said}", advice)


def printed_lines(path: Path, most_bytes: int, begin: int = 0) -> list[str]:
    """Return the last lines that a process printed, unchanged: pass them through `plain` to show them.

    Args:
        path: The file that it printed to.
        most_bytes: How much of the file's end is read.
        begin: The first byte that may be read.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            # A file that is shorter than it was at the launch is another one.
            file.seek(max(begin if begin <= size else 0, size - most_bytes))
            text = file.read(most_bytes).decode("utf-8", "replace")
    except OSError:
        return []
    # A progress bar redraws its line after each carriage return: only its last state is worth a line.
    shown = (line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
    return [line for line in shown if line.strip()]
