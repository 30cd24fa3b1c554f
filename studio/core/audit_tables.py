"""An audit's figures as tables: what each form lost, takes and answers; the same by block and by lane.

Every table says which of its figures are measured and which are estimates. Reads the report's plain values.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from studio.core.evidence import seen_sign
from studio.core.intervals import Interval
from studio.core.text import plain

Table = list[list[str]]
"""Rows of cells, the first row being the head."""

GIB = 2**30
_LONGEST_WORD = 120
_LONGEST_TABLE = 4000


def interval(value: Mapping[str, float | None]) -> str:
    """Return a figure with the ends of its interval."""
    if value["low"] is None or value["high"] is None:
        return f"{value['value']:.4f}"
    return f"{value['value']:.4f} ({value['low']:.4f}-{value['high']:.4f})"


def difference(value: Mapping[str, Any]) -> str:
    """Return a difference in loss with the ends of its interval, marked where it is within the noise."""
    if value["low"] is None or value["high"] is None:
        return f"{value['value']:+.4f}"
    noise = "" if seen_sign(Interval(**value)) else ", noise"
    return f"{value['value']:+.4f} ({value['low']:+.4f} to {value['high']:+.4f}{noise})"


def share(value: Mapping[str, Any]) -> str:
    """Return a share of answers with the ends of its interval."""
    if value["low"] is None or value["high"] is None:
        return f"{value['value']:.0%}"
    return f"{value['value']:.0%} ({value['low']:.0%}-{value['high']:.0%})"


def share_difference(value: Mapping[str, Any]) -> str:
    """Return a difference of shares in words: that none can be seen, or how large it is, in percentage points."""
    return _difference(Interval(**value), lambda share: f"{round(100 * share):+d}", " points")


def plain_difference(value: Mapping[str, Any]) -> str:
    """Return a difference of a score in words: that none can be seen, or how large it is."""
    return _difference(Interval(**value), lambda score: f"{score:+.4f}", "")


def _difference(seen: Interval, written: Callable[[float], str], unit: str) -> str:
    """Return a difference with the ends of its interval, or that none is seen where the interval holds zero."""
    if seen.low is None or seen.high is None:
        return f"{written(seen.value)}{unit}"
    ends = f"{written(seen.low)} to {written(seen.high)}"
    return f"{written(seen.value)}{unit} ({ends})" if seen.sign else f"no difference seen ({ends})"


def size(size_bytes: float | None) -> str:
    """Return bytes in MiB, or GiB from one of them on; a question mark where they are not known."""
    if size_bytes is None:
        return "?"
    return f"{size_bytes / 2**20:.1f} MiB" if size_bytes < GIB else f"{size_bytes / GIB:.2f} GiB"


def number(value: float | None, form: str) -> str:
    """Return a number in a form of `format`; a question mark where it is not known."""
    return "?" if value is None else format(value, form)


def word(text: object) -> str:
    """Return a word from outside as a cell or a line may show it."""
    return plain(str(text), one_line=True, limit=_LONGEST_WORD)


def markdown_table(table: Table) -> list[str]:
    """Return a table as lines of Markdown."""
    head, *rows = ([_cell(text) for text in row] for row in table)
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def joined(words: Sequence[str]) -> str:
    """Return words as a list that is read: commas, and an "and" before the last one."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def _cell(text: str) -> str:
    return plain(text, one_line=True).replace("|", "\\|")


_MOST_BLOCKS = 8


def variant_table(report: Mapping[str, Any]) -> Table:
    """Return what was measured of each form: its task loss with the interval, then its closeness to the reference."""
    against = report["reference"]
    of_base = report["what"] == "base"
    head = ["", "task loss", f"against {against}", "KL", "KL p99", "same top", "neutral loss"]
    rows = [head + (["base, exact"] if of_base else [])]
    for one in report["variants"]:
        task = one.get("task")
        if task is None:
            rows.append([one["name"], f"not measured: {word(one.get('why') or '?')}", *["-"] * (len(head) - 2)])
            continue
        closeness = [
            difference(task["more"]),
            interval(task["kl"]),
            f"{task['kl_tail']['value']:.3f}",
            f"{task['same_top']['value']:.1%}",
        ]
        cells = [one["name"], interval(task["loss"]), *(["-"] * 4 if one["name"] == against else closeness)]
        cells.append(f"{one['neutral']['loss']['value']:.4f}")
        rows.append(cells + ([size(one["base_bytes"])] if of_base else []))
    return rows


def use_table(report: Mapping[str, Any]) -> Table:
    """Return precision, size, memory and speed of each form, and what it is for; nothing for other audits."""
    if report["what"] != "run":
        return []
    rows = [["", "weights in", "on disk", "VRAM to serve, estimated", "tokens/s, writing", "use"]]
    for one in report["variants"]:
        serving = one["serving"]
        rows.append(
            [
                one["name"],
                word(one.get("form") or "?"),
                f"{size(one['disk_bytes'])}, {one.get('disk') or 'estimated'}",
                f"{serving['low_bytes'] / GIB:.2f}-{serving['high_bytes'] / GIB:.2f} GiB",
                _speed(one.get("speed")),
                _use(one, report["recommendation"]["best"]),
            ]
        )
    return rows


def task_table(report: Mapping[str, Any]) -> Table:
    """Return how every form fares in tasks of lm-eval; nothing where none ran."""
    tasks = report.get("lm_eval") or {}
    if not tasks.get("rows"):
        return []
    against = tasks["reference"]
    names = [form["name"] for form in tasks["forms"] if not form["why_not"]]
    rows = [["", *names]]
    for row in tasks["rows"]:
        better = {True: ", higher is better", False: ", lower is better"}.get(row["higher_is_better"], "")
        label = f"{word(row['task'])} {word(row['metric'])} ({row['documents']} documents{better})"
        scores = row["scores"]
        if not scores:
            rows.append([label, *(f"{number(row['values'].get(name), '.4f')}, no interval" for name in names)])
            continue
        rows.append([label, *(interval(scores[name]["mean"]) for name in names)])
        more = ("-" if name == against else plain_difference(scores[name]["more"]) for name in names)
        rows.append([f"  against {against}", *more])
    return rows


def answers_of(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a report's answers; empty where it has none."""
    found = report.get("answers") or {}
    return {} if found.get("why_not") else found


def answer_table(report: Mapping[str, Any]) -> Table:
    """Return how every form fares under every rule; nothing where no form gave answers."""
    answers = answers_of(report)
    if not answers:
        return []
    against = answers["reference"]
    names = list(answers["rows"][0]["answers"])
    rows = [["", *names]]
    for check in answers["checks"]:
        scores = check["scores"]
        rows.append([check["name"], *(share(scores[name]["mean"]) for name in names)])
        more = ("-" if name == against else share_difference(scores[name]["more"]) for name in names)
        rows.append([f"  against {against}", *more])
    return rows


def prompts_in_words(count: int, kind: str = "") -> str:
    """Return how many prompts, such as `1 prompt` or `20 held-out prompts`."""
    return f"{count}{kind and ' '}{kind} prompt{'' if count == 1 else 's'}"


def block_table(report: Mapping[str, Any], most: int = _MOST_BLOCKS) -> Table:
    """Return the blocks, the worst first; nothing where the report has none."""
    blocks = report.get("blocks") or []
    if not blocks:
        return []
    if report["what"] == "base":
        head = ["block", "effect alone", "weight error", "worst layer", "16 bit costs"]
        return [head, *(_base_block(block, report["asked"]) for block in blocks[:most])]
    ordered = sorted(blocks, key=lambda block: -(block["ratio"] or 0.0))
    head = ["block", "rounding", "adapter", "rounding / adapter"]
    return [head, *(_run_block(block) for block in ordered[:most])]


def plan_table(report: Mapping[str, Any]) -> Table:
    """Return the measured mixed plans; nothing where none was measured."""
    plans = report.get("plans") or []
    head = ["kept in 16 bit", "costs", "KL won", "KL left", "task loss"]
    rows = [
        [
            ", ".join(plan["kept"]),
            size(plan["extra_bytes"]),
            interval(plan["won"]),
            f"{plan['figures']['kl']['value']:.4f}",
            interval(plan["figures"]["loss"]),
        ]
        for plan in plans
    ]
    return [head, *rows] if rows else []


def proposal_table(report: Mapping[str, Any]) -> Table:
    """Return what more bits in some layers buy, the least bytes for each share; nothing where that is not known."""
    head = ["model.precision", "takes more", "of what 4 bits cost", "share a GiB"]
    rows = [
        [
            written_precision(one["precision"]),
            size(one["extra_bytes"]),
            f"-{one['buys']:.1%}",
            f"{one['buys'] / one['extra_bytes'] * GIB:.2f}",
        ]
        for one in report.get("proposals") or ()
    ]
    return [head, *rows] if rows else []


def written_precision(table: Mapping[str, str]) -> str:
    """Return a table of precisions on one line, as `--set model.precision=` takes it."""
    return plain(", ".join(f"{name}={bits}" for name, bits in table.items()), one_line=True, limit=_LONGEST_TABLE)


def lane_table(report: Mapping[str, Any]) -> Table:
    """Return the lanes of a race side by side: precision, fidelity, memory, speed, use."""
    lanes = report["lanes"]
    first, best = lanes[0]["name"], report["recommendation"]["best"]
    return [
        ["", *(lane["name"] for lane in lanes)],
        ["base held in", *(word(lane.get("form") or "?") for lane in lanes)],
        ["held-out loss, measured", *(interval(lane["task"]["loss"]) for lane in lanes)],
        [f"against {first}", *("-" if lane["name"] == first else difference(lane["task"]["more"]) for lane in lanes)],
        ["neutral loss, measured", *(f"{lane['neutral']['loss']['value']:.4f}" for lane in lanes)],
        ["peak memory, estimated", *(size(lane["peak_predicted_bytes"]) for lane in lanes)],
        [_peak_label(lanes), *(size(lane["peak_measured_bytes"]) for lane in lanes)],
        ["tokens/s, measured", *(number(lane["tokens_per_second"], ",.0f") for lane in lanes)],
        ["seconds, measured", *(number(lane["seconds"], ",.0f") for lane in lanes)],
        ["adapter on disk", *(size(lane["adapter_bytes"]) for lane in lanes)],
        ["use", *("advised" if lane["name"] == best else "-" for lane in lanes)],
    ]


def _speed(speed: Mapping[str, Any] | None) -> str:
    """Return the tokens a second that a form writes, whether that was measured, and with what and where."""
    if not speed or speed.get("decode_tokens_per_second") is None:
        return "not measured"
    where = " ".join(str(part) for part in (speed.get("runtime"), speed.get("device")) if part)
    return f"{speed['decode_tokens_per_second']:.1f} {speed['how']} ({word(where)}, {speed['tokens']} tokens)"


def _use(one: Mapping[str, Any], best: str) -> str:
    """Return what a form is for: advised, possible, or only measured for comparison."""
    if one["name"] == best:
        return "advised"
    return "can be used" if one.get("usable") else "to compare"


def _peak_label(lanes: Sequence[Mapping[str, Any]]) -> str:
    """Say what was measured: a CPU run knows only what its whole process holds, libraries included."""
    whole = any(lane.get("peak_measured") == "resident" for lane in lanes)
    return "whole process, measured" if whole else "peak memory, measured"


def _base_block(block: Mapping[str, Any], asked: str) -> list[str]:
    worst = block["linears"][0] if block["linears"] else None
    effect = block["own_effect"]
    return [
        block["name"],
        "?" if effect is None else f"{effect:.2%}",
        f"{block['weight_error'][asked]:.2%}",
        f"{worst['name'].removeprefix(block['name'] + '.')} {worst['weight_error']:.2%}" if worst else "-",
        size(block["kept_extra_bytes"]),
    ]


def _run_block(block: Mapping[str, Any]) -> list[str]:
    ratio = "-" if block["ratio"] is None else f"{block['ratio']:.1f}"
    return [block["name"], f"{block['rounding']:.2%}", f"{block['adapter']:.3%}", ratio]
