"""Runs on a folder and on a data set of the hub: checked, trained, resumed and audited by the same words."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from studio.core.errors import BadInput
from studio.core.events import Phase, Warned
from studio.core.recipe import Recipe
from studio.core.sources import Source
from studio.probe import preflight
from studio.probe.audit import audit_of_run, rows_to_measure
from studio.probe.preflight import check_training
from studio.probe.quality import data_fingerprint
from studio.probe.resume import _data_bytes, check_resume
from studio.runs.held_out import read_record
from studio.runs.layout import RunPaths
from studio.runs.log import read_events
from tests.fakes.hub import COMMIT, hub
from tests.jobs.conftest import QUESTIONS, Train, history_of


def chats(*places: int) -> str:
    rows = [QUESTIONS[place] for place in places]
    turns = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}] for question, answer in rows
    ]
    return "".join(json.dumps({"messages": row}) + "\n" for row in turns)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inside = tmp_path / "chats" / "data"
    inside.mkdir(parents=True)
    (inside / "train-00000-of-00002.jsonl").write_text(chats(0, 1))
    (inside / "train-00001-of-00002.jsonl").write_text(chats(2, 3) + "no row\n")
    (inside / "test-00000-of-00001.jsonl").write_text(chats(4, 5))
    return tmp_path / "chats"


@pytest.fixture
def on_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The folder as a data set of a stand-in for the hub, for the client in this process; yields what is asked."""
    with hub("owner/chats", folder, kind="datasets") as (endpoint, asked):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
        monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path / "hf"), raising=False)
        monkeypatch.setenv("LORA_STUDIO_HOME", str(tmp_path / "home"))
        yield asked


def answers(paths: RunPaths) -> tuple[list[str], list[str]]:
    """What a run's record says: the words for what it trained on, and what its audit measures."""
    record = read_record(paths)
    return [record.data, record.held_from], [row.answer for row in rows_to_measure(audit_of_run(paths)).rows]


def test_a_folder_is_trained_on_its_train_split_and_measured_on_its_test_split(
    train: Train, recipe: Recipe, folder: Path
) -> None:
    on_folder = recipe.with_("data.path", str(folder)).with_("data.eval_path", str(folder))
    with pytest.raises(BadInput, match=r"data/train-00001-of-00002\.jsonl, line 3: not JSON"):
        check_training(on_folder)
    on_folder = on_folder.with_("data.on_bad_row", "skip")
    notes = check_training(on_folder).notes
    assert "chats: of the splits train, test train is read." in notes
    assert any(
        "1 row is left out, 4 rows kept: 1 that are not JSON (the first: data/train-00001" in one for one in notes
    )
    paths = train(on_folder)
    assert len(history_of(paths).train.losses) == 5
    told = [event.message for event in read_events(paths.events) if isinstance(event, Warned)]
    assert "chats: of the splits train, test test is read." in told
    words, measured = answers(paths)
    assert words == [f"{folder}:train", f"{folder}:test"]
    assert measured == [QUESTIONS[4][1], QUESTIONS[5][1]]
    check_resume(paths, on_folder)
    assert len(data_fingerprint(on_folder)) == 32
    (folder / "data" / "train-00000-of-00002.jsonl").write_text(chats(1, 0))
    with pytest.raises(BadInput, match="the same 4 rows in another order"):
        check_resume(paths, on_folder)


def test_a_data_set_of_the_hub_is_trained_at_the_commit_that_was_checked(
    train: Train, recipe: Recipe, folder: Path, on_hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "data" / "train-00001-of-00002.jsonl").write_text(chats(2, 3))
    named = recipe.with_("data.path", "owner/chats").with_("data.eval_path", "owner/chats")
    assert check_training(named.with_("data.revision", "main")).recipe.data.revision == COMMIT
    checked = check_training(named)
    assert checked.data is not None
    assert len(checked.data.rows) == 4
    assert checked.recipe.data.revision == COMMIT
    measured_there = named.with_("data.path", str(folder / "data")).with_("data.eval_path", "owner/chats:test")
    assert check_training(measured_there).recipe.data.eval_path == f"owner/chats@{COMMIT}:test"
    on_hub.clear()
    paths = train(checked.recipe)
    assert len(history_of(paths).train.losses) == 5
    assert on_hub == [], "what was checked is in the cache, and its commit cannot change"
    words, measured = answers(paths)
    assert words == [f"owner/chats@{COMMIT}:train", f"owner/chats@{COMMIT}:test"]
    assert measured == [QUESTIONS[4][1], QUESTIONS[5][1]]
    check_resume(paths, checked.recipe)
    assert 0 < _data_bytes(checked.recipe) < 10_000
    assert len(data_fingerprint(checked.recipe)) == 32


@pytest.mark.slow
def test_much_data_of_the_hub_is_downloaded_by_the_run(
    train: Train, recipe: Recipe, folder: Path, on_hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "data" / "train-00001-of-00002.jsonl").write_text(chats(2, 3))
    monkeypatch.setattr(preflight, "_AT_ONCE_BYTES", 10)
    named = recipe.with_("data.path", "owner/chats:train")
    checked = check_training(named)
    assert checked.data is None
    assert checked.recipe.data.revision == COMMIT
    both = named.with_("data.eval_path", "owner/chats:test")
    assert check_training(both).recipe.data.eval_path == "owner/chats:test", "of the same data set, at its commit"
    (other,) = check_training(
        both.with_("data.path", "embedded").with_("data.sources", (Source("owner/chats:train"),))
    ).recipe.data.sources
    assert other.path == f"owner/chats@{COMMIT}:train"
    assert "owner/chats:train: 0.0 GB are downloaded by the run; it checks the rows then." in checked.notes
    assert not any("/resolve/" in request for request in on_hub)
    assert _data_bytes(named) == float("inf")
    paths = train(checked.recipe)
    assert len(history_of(paths).train.losses) == 5
    phases = [event.name for event in read_events(paths.events) if isinstance(event, Phase)]
    assert phases.index("downloading the data") < phases.index("reading the data")
