"""Answers and the other parts of a run's report as tables and words, whatever stands in prompts and answers."""

from studio.core.audit_tables import answer_table, use_table, variant_table
from studio.core.audit_text import advice_lines, answer_lines, markdown_of, note_lines, shown_answers, tables_of
from tests.fakes.audit_job import answers_report, base_report, run_report

NASTY = "a\x1b[2J\n# head\n| cell |\n```\n[bold]"


def test_every_form_and_every_rule_has_a_cell() -> None:
    head, mean, more = answer_table(run_report())
    assert head == ["", "base", "tuned, nf4+dq"]
    assert mean == ["exact match", "25% (15%-35%)", "50% (30%-70%)"]
    assert more == ["  against tuned, nf4+dq", "-50 points (-70 to -30)", "-"]


def test_words_say_which_differences_are_seen() -> None:
    report = run_report()
    report["answers"] = answers_report("base", "tuned, 16-bit", "tuned, nf4+dq")
    lines = "\n".join(answer_lines(report))
    assert "base against tuned, nf4+dq: lower in exact match." in lines
    assert "tuned, 16-bit against tuned, nf4+dq: no difference seen under any rule." in lines
    assert "merged, 16-bit gave no answers: needs about 30.0 GB of memory." in lines
    assert "tuned, nf4+dq is the model as it was trained" in lines
    assert "exact match: equal." in lines


def test_what_to_try_next_follows_the_advice() -> None:
    assert not any("Try next" in line for line in advice_lines(run_report()))
    tried = [{"words": "raise the learning rate\x1b[2J", "settings": {}}]
    assert advice_lines(run_report() | {"next": tried})[3:] == ["Try next: raise the learning rate\\x1b[2J."]


def test_another_form_is_the_reference_where_the_trained_model_gave_no_answers() -> None:
    report = run_report()
    report["answers"] = answers_report("base", "tuned, nf4+dq") | {"reference": "base"}
    assert "base is the reference, as the trained model gave no answers." in "\n".join(answer_lines(report))


def test_a_single_prompt_is_called_one() -> None:
    report = run_report()
    report["answers"] = answers_report("base", "tuned, nf4+dq") | {"prompts": 1}
    told = "\n".join([*answer_lines(report), *(heading for heading, _ in tables_of(report))])
    assert "1 held-out prompt, answered greedily" in told
    assert "1 prompt is too few to tell forms apart" in told
    assert "Answers to 1 held-out prompt, measured" in told
    assert "1 prompts" not in told and "1 held-out prompts" not in told


def test_a_report_without_answers_has_nothing_of_them() -> None:
    report = base_report()
    assert answer_table(report) == [] and answer_lines(report) == [] and list(shown_answers(report)) == []
    report["answers"] = {"why_not": "no prompt fits"}
    assert answer_table(report) == [] and answer_lines(report) == ["No answers: no prompt fits"]


def test_the_five_tables_of_a_choice_are_there_and_marked() -> None:
    """Precision, memory, fidelity, speed, use: measured or estimated."""
    head, *rows = use_table(run_report())
    assert head == ["", "weights in", "on disk", "VRAM to serve, estimated", "tokens/s, writing", "use"]
    by_name = {row[0]: row[1:] for row in rows}
    speed = "17.2 measured (llama.cpp cpu, 32 tokens)"
    assert by_name["trained"] == ["16-bit", "256.0 MiB, estimated", "1.00-2.00 GiB", speed, "can be used"]
    assert by_name["merged 16-bit"][-2:] == ["not measured", "advised"]
    assert by_name["base alone"][-1] == "to compare"
    assert by_name["q4_k_m"][1] == "256.0 MiB, measured"
    assert "measured" in tables_of(run_report())[0][0]


def test_a_form_that_could_not_be_measured_says_why() -> None:
    head, *rows = variant_table(run_report())
    assert rows[-1][:3] == ["q4_k_m", "not measured: llama.cpp is not installed", "-"]
    assert len(rows[-1]) == len(head)


def test_notes_of_forgetting() -> None:
    assert "No forgetting can be seen." in note_lines(run_report())


def test_notes_of_rows_end_in_one_stop_and_leave_file_names_as_they_are() -> None:
    report = run_report() | {"rows_from": "all 9 rows of x.jsonl", "rows_notes": ["x.jsonl: columns not used: a."]}
    assert note_lines(report)[:2] == ["Measured on all 9 rows of x.jsonl.", "x.jsonl: columns not used: a."]


def test_texts_stay_texts_on_the_page_and_off_a_card() -> None:
    report = run_report()
    report["answers"] = answers_report(text=NASTY)
    report["answers"]["rows"][0]["prompt"] = NASTY
    page = markdown_of(report)
    assert "\x1b" not in page
    assert "\n# head" not in page.removeprefix("# Audit") and "\n```" not in page and "\n    # head" in page
    assert "### Prompt 2" in page and "(exact match: no)" in page
    card = markdown_of(report, texts=False)
    assert "Prompt 2" not in card and "# head" not in card, "the rows of a user's data are nobody else's business"
    assert "exact match" in card
