import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from studio.cli import main
from tests.fakes.cli import FAKES
from tests.fakes.runs import CHECKOUT

Cli = Callable[..., "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """What one call of the command line did."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document on stdout."""
        return json.loads(self.out)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home of the program, in which fake workers are found; no hub, no colours, 80 columns."""
    settings = {
        "LORA_STUDIO_HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(CHECKOUT),
        "COLUMNS": "80",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hub"),
        "FAKE_STEPS": "5",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LORA_STUDIO_DEBUG", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


@pytest.fixture
def cli(home: Path, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Calls `main` in this process with fake jobs."""

    def call(*words: str) -> Outcome:
        capsys.readouterr()
        code = main(list(words), modules=FAKES)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture
def recipe(home: Path) -> Path:
    """A recipe of real rows in the current folder."""
    rows = ({"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(20))
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = Path("mine.toml")
    path.write_text("name = 'mine'\n[data]\npath = 'rows.jsonl'\n[eval]\nrows = 4\n")
    return path
