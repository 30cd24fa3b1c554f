"""The runner of the checks: whatever a check does, the next one runs, and what it did not leave as it was is named."""

import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.gpu import processes
from tests.gpu.bench import Bench, Seen, Skip, Wrong
from tests.gpu.report import open_report
from tests.gpu.runner import FAILED, NOT_RUN, OK, SKIP, Check, Result, Runner, Surroundings, run_all

HERE = "tests.gpu.test_runner"


def good(bench: Bench, word: str) -> Seen:
    (bench.folder / "of-its-own").write_text("deleted with its folder")
    return Seen(f"all is well: {word}", ("more",), {"seconds": 1.5})


def lacks(bench: Bench) -> Seen:
    raise Skip("no bf16: compute capability 7.5")


def wrong(bench: Bench) -> Seen:
    assert bench.device == "cuda", "the losses differ"
    return Seen("")


def raises(bench: Bench) -> Seen:
    raise ZeroDivisionError("a fault")


def shows(bench: Bench) -> Seen:
    raise Wrong("the trace is off", Seen("", ("a table",), {"bytes": 7}))


def hangs(bench: Bench) -> Seen:
    print("waiting for the card", flush=True)
    time.sleep(600)
    return Seen("")


def hangs_with_a_child(bench: Bench) -> Seen:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    return hangs(bench)


def crashes(bench: Bench) -> Seen:
    ctypes.string_at(0)
    return Seen("")


def leaves(bench: Bench) -> Seen:
    print("Error invalid device function at line 143", file=sys.stderr, flush=True)
    os._exit(1)


def out_of_memory(bench: Bench) -> Seen:
    os.kill(os.getpid(), 9)
    return Seen("")


def leaks_a_variable(bench: Bench) -> Seen:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return Seen("trained on the CPU")


def leaks_a_file(bench: Bench, where: str) -> Seen:
    Path(where).write_text("not mine")
    return Seen("done")


def leaks_a_process(bench: Bench) -> Seen:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    return Seen("done")


def leaks_a_forked_process(bench: Bench) -> Seen:
    bench.start("timeit", "-n", "1", "import time; time.sleep(600)", output=bench.folder / "log")
    return Seen("done")


def starts_a_module(bench: Bench) -> Seen:
    log = bench.folder / "log"
    code = bench.start("tests.gpu.test_runner", "word", output=log).wait(60)
    return Seen(f"{code} {log.read_text().strip()}")


@pytest.fixture
def watched(tmp_path: Path) -> Path:
    folder = tmp_path / "watched"
    folder.mkdir()
    (folder / "kept").write_text("as it was")
    return folder


@pytest.fixture
def runner(tmp_path: Path, watched: Path) -> Runner:
    root = str(Path(__file__).parents[2])
    return Runner(
        "cpu", tmp_path / "session", {**os.environ, "PYTHONPATH": root}, watched=[watched], leaving_seconds=0.3
    )


def check(function: str, *arguments: str, limit: float = 60.0) -> Check:
    return Check(function.replace("_", " "), "fakes", f"{HERE}:{function}", arguments, limit)


HUNG = "hung: ended after its limit of {:.0f} s"
SAID = {
    "good": (OK, "all is well: word"),
    "lacks": (SKIP, "no bf16: compute capability 7.5"),
    "wrong": (FAILED, "the losses differ (test_runner.py:"),
    "raises": (FAILED, "ZeroDivisionError: a fault (test_runner.py:"),
    "shows": (FAILED, "the trace is off (test_runner.py:"),
    "hangs": (FAILED, HUNG),
    "hangs_with_a_child": (FAILED, HUNG),
    "crashes": (FAILED, "ended by SIGSEGV"),
    "leaves": (FAILED, "exit code 1 and no exception: Error invalid device function at line 143"),
    "out_of_memory": (FAILED, "ended by SIGKILL; the system does that when its memory is full"),
    "leaks_a_variable": (FAILED, "did not leave all as it was; it said: trained on the CPU"),
    "leaks_a_file": (FAILED, "did not leave all as it was; it said: done"),
    "leaks_a_process": (FAILED, "did not leave all as it was; it said: done"),
    "leaks_a_forked_process": (FAILED, "did not leave all as it was; it said: done"),
    "nothing_of_this_name": (FAILED, "exit code 1"),
    "starts_a_module": (OK, "0 ['word']"),
}
"""What each fake check is told as."""


def all_judged(runner: Runner, watched: Path, names: list[str], limit: float) -> dict[str, Result]:
    """Run fake checks one after another, and a good one at the end."""
    words = {"good": ["word"], "leaks_a_file": [str(watched / "stray")]}
    checks = [check(name, *words.get(name, []), limit=limit if "hangs" in name else 60.0) for name in names]
    told: list[Result] = []
    before = Surroundings.look([])
    results = run_all(runner, [*checks, Check("last", "fakes", f"{HERE}:good", ("last",), 60)], told.append)
    assert told == results
    assert results[-1].outcome == OK
    for name, result in zip(names, results, strict=False):
        outcome, said = SAID[name]
        assert result.outcome == outcome, result
        assert said.format(limit) in result.said, result
        assert len(result.changed) == name.startswith("leaks"), result.changed
        assert bool(result.output) <= (outcome == FAILED)
    assert before.changes_to(Surroundings.look([])) == []
    asleep = ["import time; time.sleep(600)"]
    assert not [
        process for process in psutil.process_iter(["cmdline"]) if (process.info["cmdline"] or [])[-1:] == asleep
    ]
    assert not (runner.session / "check").exists()
    return dict(zip(names, results, strict=False))


@pytest.mark.slow
def test_whatever_a_check_does_the_others_run(runner: Runner, watched: Path) -> None:
    runner.session.mkdir()
    with processes.Server(runner.session / "server", [HERE], runner.environment) as server:
        runner.server = server.address
        seen = all_judged(runner, watched, list(SAID), limit=2.0)
    assert seen["good"].lines == ("more",)
    assert seen["good"].figures == {"seconds": 1.5}
    assert (seen["shows"].lines, seen["shows"].figures) == (("a table",), {"bytes": 7})
    assert seen["leaks_a_variable"].changed[0].startswith("variable CUDA_VISIBLE_DEVICES")
    assert seen["leaks_a_file"].changed == (f"file {watched / 'stray'} new",)
    assert "time.sleep(600)" in seen["leaks_a_process"].changed[0]


@pytest.mark.slow
def test_processes_with_interpreters_of_their_own_are_judged_alike(runner: Runner, watched: Path) -> None:
    names = ["hangs_with_a_child", "crashes", "leaves", "leaks_a_process", "starts_a_module"]
    seen = all_judged(runner, watched, names, limit=10.0)
    assert seen["hangs_with_a_child"].said.endswith(": waiting for the card")


def test_what_does_not_fit_the_time_is_not_begun(runner: Runner) -> None:
    results = run_all(runner, [check("good", "x", limit=20), check("hangs", limit=4000)], lambda _: None, seconds=300)
    assert [result.outcome for result in results] == [OK, NOT_RUN]
    assert "its limit of 4000 s does not fit" in results[1].said


MACHINE = {"device": "cuda", "card": "Tesla T4 GPU-4", "driver": "580.65", "versions": {"torch": "2.13.0"}}


def test_calls_fill_one_report_and_what_ran_again_is_replaced(tmp_path: Path) -> None:
    names = ["one", "two", "three", "four"]
    first = open_report(tmp_path, MACHINE)
    first.add(Result("two", "p", FAILED, 2.0, "off by | half", ("a row",), {"bytes": 7}, (), ("Traceback",)))
    first.add(Result("one", "p", OK, 1.0, "fine"))
    first.add(Result("three", "p", NOT_RUN, said="no time"))
    first.save(tmp_path, names)
    again = open_report(tmp_path, dict(MACHINE))
    assert [result.name for result in again.ordered(names)] == ["one", "two", "three"]
    assert again.results["two"].figures == {"bytes": 7}
    again.add(Result("two", "p", OK, 2.0, "fine now"))
    again.add(Result("one", "p", NOT_RUN, said="no time"))
    machine, section = again.save(tmp_path, names)
    table = json.loads(machine.read_text())
    assert [(one["name"], one["outcome"]) for one in table["checks"]] == [("one", OK), ("two", OK), ("three", NOT_RUN)]
    assert table["missing"] == ["four"]
    assert f"## {again.date}, Tesla T4 GPU-4" in section.read_text()
    assert "2 ok, 1 not run; 1 not yet run." in section.read_text()


def test_another_card_gets_a_report_of_its_own_and_the_older_one_is_kept(tmp_path: Path) -> None:
    report = open_report(tmp_path, MACHINE)
    report.add(Result("one", "p", FAILED, 1.0, "a | b", ("a row",), {}, ("file x new",), ("Traceback",)))
    _, section = report.save(tmp_path, ["one"])
    text = section.read_text()
    assert "| p | one | FAILED | 1 | a \\| b; not as before: file x new |" in text
    assert "a row\nprinted: Traceback\n```" in text
    other = open_report(tmp_path, {**MACHINE, "card": "NVIDIA A100 GPU-8"})
    assert not other.results
    assert len(list(tmp_path.glob("results-cuda-until-*"))) == 2


if __name__ == "__main__":
    print(sys.argv[1:])
