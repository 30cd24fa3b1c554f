"""Completion is made of the parser: every verb and flag is offered where it can stand, and shells take the scripts."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from studio.cli import VERBS
from tests.cli.conftest import Cli
from tests.fakes.runs import make_run


def _offered(script: Path, *lines: str) -> list[list[str]]:
    """Return what bash offers for the last word of each line; the program itself is a stand-in that names one run."""
    asked = ['lora-studio() { [ "$3" = runs ] && echo my-run || echo my-recipe; }', f"source {script}"]
    for line in lines:
        words = [*line.split(" ")]
        asked.append(f"COMP_WORDS=({' '.join(repr(word) for word in words)}); COMP_CWORD={len(words) - 1}")
        asked.append('COMPREPLY=(); _lora_studio; echo "${COMPREPLY[*]}"')
    done = subprocess.run(
        ["bash", "--norc", "-c", "\n".join(asked)], capture_output=True, text=True, check=True, cwd=script.parent
    )
    assert done.stderr == ""
    return [line.split() for line in done.stdout.splitlines()]


def test_bash_offers_what_can_stand_there(cli: Cli, home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("")
    script = folder / "script"
    script.write_text(cli("completion", "bash").out)
    first, verbs, flags, choice, live, recipe, file, nothing, after = _offered(
        script,
        "lora-studio ",
        "lora-studio --runs-dir . runs sh",
        "lora-studio runs list --j",
        "lora-studio plan --method ",
        "lora-studio runs show my",
        "lora-studio plan my-",
        "lora-studio data check ro",
        "lora-studio plan --rank ",
        "lora-studio train --method ql",
    )
    assert set(first) >= set(VERBS)
    assert verbs == ["show"]
    assert flags == ["--json"]
    assert choice == ["lora", "qlora"]
    assert live == ["my-run"]
    assert recipe == ["my-recipe"]
    assert file == ["rows.jsonl"]
    assert nothing == []
    assert after == ["qlora"]


def test_every_shell_gets_every_verb_and_the_manual_too(cli: Cli, home: Path, tmp_path: Path) -> None:
    texts = {shell: cli("completion", shell).out for shell in ("bash", "zsh", "fish", "man")}
    for shell, text in texts.items():
        for verb in VERBS:
            assert re.search(rf"\b{verb}\b", text), (shell, verb)
        assert "grad" in text
    assert texts["zsh"].startswith("#compdef lora-studio\n")
    for shell in ("bash", "zsh", "fish"):
        if shutil.which(shell):
            script = tmp_path / f"script.{shell}"
            script.write_text(texts[shell])
            assert subprocess.run([shell, "-n", str(script)], capture_output=True, check=False).returncode == 0
    # roff obeys a line that begins with a dot, or with a quote: each of ours is one of these requests
    requests = {line.split(" ")[0] for line in texts["man"].splitlines() if line[:1] in (".", "'")}
    assert requests == {".TH", ".SH", ".SS", ".B", ".TP"}
    if shutil.which("groff"):
        done = subprocess.run(
            ["groff", "-man", "-ww", "-Tutf8"], input=texts["man"], capture_output=True, text=True, check=True
        )
        assert done.stderr == ""
        assert "--no-double-quant" in done.stdout


@pytest.mark.skipif(not shutil.which("fish"), reason="fish is not here")
def test_fish_offers_what_can_stand_there(cli: Cli, home: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    (tmp_path / "script").write_text(cli("completion", "fish").out)
    lines = ("runs --runs-dir . sh", "plan --method q", "data check ro", "plan --rank ")
    asked = "; ".join(f"complete -C 'lora-studio {line}'; echo ." for line in lines)
    done = subprocess.run(
        ["fish", "--no-config", "-c", f"source script; {asked}"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert done.stderr == ""
    offered = [line.partition("\t")[0] for line in done.stdout.splitlines()]
    assert offered == ["show", ".", "qlora", ".", "rows.jsonl", ".", "."]


def test_names_are_those_of_the_runs_and_recipes(cli: Cli, home: Path) -> None:
    names = [make_run(home, "mine", now=float(at)).name for at in (1, 2)]
    assert cli("completion", "--names", "runs").out.split() == [*sorted(names), "last"]
    assert "demo" in cli("completion", "--names", "recipes").out.split()
    assert cli("completion").code == 2
    assert cli("completion", "powershell").code == 2
