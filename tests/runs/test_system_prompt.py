"""The system prompt of a training, as a chat finds it with the run."""

from pathlib import Path

from studio.runs.layout import RunPaths
from studio.runs.system_prompt import NO_SYSTEM_PROMPT, SystemPrompt, commonest, keep_system_prompt, read_system_prompt


def test_the_commonest_is_usual_where_most_rows_have_it() -> None:
    assert commonest([]) == NO_SYSTEM_PROMPT
    assert commonest(["a", "b", "a"]) == SystemPrompt("a", 2, 3)
    assert commonest(["a", "b", "a"]).usual == "a"
    assert commonest(["a", "b"]).usual == "", "half of the rows are not most of them"
    assert commonest(["a", "", ""]) == SystemPrompt("", 2, 3)


def test_it_is_kept_with_the_run_and_a_damaged_file_is_none(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    assert read_system_prompt(paths) == NO_SYSTEM_PROMPT
    prompt = SystemPrompt("Réponds. \x1b[31m", 3, 4)
    keep_system_prompt(paths, prompt)
    assert read_system_prompt(paths) == prompt
    for damaged in ("{", '{"text": 3, "rows": 1, "of": 1}', "[]"):
        paths.system_prompt.write_text(damaged)
        assert read_system_prompt(paths) == NO_SYSTEM_PROMPT
