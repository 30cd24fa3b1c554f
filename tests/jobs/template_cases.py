"""Chat templates times kinds of conversation, and a judge of what is trained on each.

A case is `exact` where every answer is trained once, from its first token to a stop, behind the very tokens that
`apply_chat_template(add_generation_prompt=True)` gives, and nothing else is trained; `refused` where the template
refuses the row and the report says why; `told` where each deviation is in the report's counts. All else is `wrong`.

    python -m tests.jobs.template_cases FOLDER      judges every *.jinja in a folder and prints a summary
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from studio.jobs.base.data.bounded import apply_template, freeze_date
from studio.jobs.base.data.labels import IGNORED
from studio.jobs.base.data.row_report import RowReport
from studio.jobs.base.data.rows import Encoder, Encoding, Example
from studio.jobs.base.data.spelling import USUAL, features_of, options, spellings, table_of
from studio.jobs.base.data.template import with_system_folded
from studio.probe.data import Conversation, Message, ToolCall
from tests.fakes.prose import prose

FOLDER = Path(__file__).parents[1] / "templates"
DATE = datetime(2031, 5, 1)
_BAR = "\uff5c"
"""The wide bar in DeepSeek's tokens."""
_WORDS = (
    r"<\|[^|<>\s{}'\"]{1,40}\|>",
    rf"<{_BAR}[^{_BAR}<>\s]{{1,40}}{_BAR}>",
    r"<[a-z_]+\|>|<\|[a-z_]+>|<(?:start|end)_of_turn>|<SPECIAL_\d+>|<end_of_utterance>",
    r"\[/?(?:INST|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|SYSTEM_PROMPT|THINK|TOOL_CONTENT|ARGS|CALL_ID)\]",
    r"<s>|</s>|<bos>|<eos>|\[gMASK\]|<sop>|<seed:[a-z_:]+>|</seed:[a-z_:]+>|\]~[a-z!]*b?\[|\[e~\[",
)
_TOKEN = re.compile("|".join(_WORDS))
"""What is one token, marked special, in the tokenizers of these models."""
_SOFT = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
"""What is one token that is not marked special."""
_ENDS = {
    "GLM": "<|endoftext|>", "glm": "<|endoftext|>", "gemma": "<eos>", "granite": "<|end_of_text|>", "gpt": "<|return|>",
    "phi": "<|endoftext|>", "Phi": "<|endoftext|>", "Seed": "<seed:eos>", "ohere": "<|END_OF_TURN_TOKEN|>",
    "command": "<|END_OF_TURN_TOKEN|>", "own-next": "<|endoftext|>", "own-no-system": "<eos>",
    "own-always": "<|END_OF_TURN|>", "own-drops": "<|endoftext|>", "Nemotron-Nano-v2": "<SPECIAL_12>",
}  # fmt: skip
"""The end token of some models' tokenizers, by what their templates are called; others end as a conversation does."""

_TOOLS = json.dumps(
    [
        {
            "type": "function",
            "function": {
                "name": "weather_of",
                "description": "Tells the weather.",
                "parameters": {
                    "type": "object",
                    "properties": {"city": {"type": "string", "description": "Where."}, "days": {"type": "integer"}},
                    "required": ["city"],
                },
            },
        },
        {
            "type": "function",
            "function": {
                "name": "time_in",
                "description": "Tells the time.",
                "parameters": {"type": "object", "properties": {"zone": {"type": "string", "description": "Which."}}},
            },
        },
    ]
)
_WEATHER = ToolCall("weather_of", '{"city": "Oslø", "days": 3}', "call_a1b2c3")
_TIME = ToolCall("time_in", '{"zone": "CET \\"x\\""}', "call_d4e5f6")


def _user(text: str) -> Message:
    return Message("user", text)


def _says(text: str, reasoning: str = "", *calls: ToolCall) -> Message:
    return Message("assistant", text, reasoning=reasoning, calls=calls)


def _result(text: str, call: ToolCall) -> Message:
    return Message("tool", text, name=call.name, call_id=call.id)


_BRIEF = Message("system", "Be brief.")
_HOW = _user("How warm is Oslo?")
KINDS: dict[str, tuple[Message, ...]] = {
    "single": (_HOW, _says("Quite warm.")),
    "multi": (_HOW, _says("Quite warm."), _user("And Rome?"), _says("Warmer still."), _user("Bern?"), _says("Mild.")),
    "system": (_BRIEF, _HOW, _says("Quite warm."), _user("And Rome?"), _says("Warmer.")),
    "call": (_HOW, _says("", "", _WEATHER), _result('{"celsius": 21}', _WEATHER), _says("It has 21 degrees.")),
    "calls twice": (
        _BRIEF, _HOW, _says("Let me look.", "", _WEATHER), _result("21 degrees", _WEATHER), _says("21."),
        _user("Now?"), _says("", "", _TIME), _result("noon", _TIME), _says("Noon."),
    ),
    "parallel calls": (
        _HOW, _says("", "", _WEATHER, _TIME), _result("21 degrees", _WEATHER), _result("noon", _TIME),
        _says("21 at noon."),
    ),
    "ends with a call": (_HOW, _says("Let me look.", "", _WEATHER)),
    "reasoning": (_HOW, _says("Quite warm.", "Oslo lies north.\nIt is June.")),
    "reasoning twice": (_HOW, _says("Quite warm.", "It is June."), _user("And Rome?"), _says("Warmer.", "Far south.")),
    "reasoning and calls": (
        _HOW, _says("", "I must look.", _WEATHER), _result("21 degrees", _WEATHER), _says("It has 21.", "So it does."),
    ),
    "reasoning in the content": (
        _HOW, _says("<think>\nIt is June.\n</think>\n\nQuite warm."), _user("And Rome?"),
        _says("<think>\nFar south.\n</think>\n\nWarmer."),
    ),
    "white space": (_user(" How warm? \n"), _says("\n  Quite warm.  \n"), _user("And?"), _says(" So. ")),
    "tags": (_HOW, _says("<answer>warm</answer>"), _user("And?"), _says("<t")),
    "special tokens": (_user("What is <|im_end|> or </s>?"), _says("A token, <|im_end|> ends a turn.")),
    "answers in a row": (_HOW, _says("Quite warm."), _says("That is 21."), _user("And?"), _says("Mild.")),
}  # fmt: skip


def conversation(kind: str) -> Conversation:
    """Return the conversation of a kind."""
    turns = KINDS[kind]
    return Conversation(turns, 7, tools=_TOOLS if any(turn.calls for turn in turns) else "")


@cache
def _merging() -> str:
    """Return a tokenizer with merges, as JSON: a token may reach over any border that no special token guards."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.decoder = decoders.ByteLevel()
    texts = prose().splitlines()
    said = [f"{turn.role}\n{turn.words}\n\n" * 20 for turns in KINDS.values() for turn in turns]
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, show_progress=False, initial_alphabet=letters)
    learner.train_from_iterator([*texts, *said], trainer)
    return str(learner.to_str())


def special_words(template: str) -> list[str]:
    """Return the special tokens that a template writes, but those that every tokenizer has."""
    named = {"<s>", "</s>", "<bos>", "<eos>"}
    # Mistral's first models write [INST] as text.
    return sorted(word for word in {*_TOKEN.findall(template)} - named if "INST" not in word)


def tokenizer_for(template: str, name: str) -> Any:
    """Return a small tokenizer with a template and the special tokens that it writes."""
    made = Tokenizer.from_str(_merging())
    end = next((token for part, token in _ENDS.items() if part in name), None)
    begin = "<bos>" if "gemma" in name or "no-system" in name else "<s>"
    words = sorted({*_TOKEN.findall(template), "<s>", "</s>", begin, *([end] if end else [])})
    made.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in words])
    made.add_tokens([AddedToken(word, special=False, normalized=False) for word in _SOFT if word in template])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token=begin, eos_token=end or "</s>")
    fast.chat_template = template
    freeze_date(fast, DATE)
    if not end:
        turns = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "ANSWER"}]
        try:
            text = str(apply_template(fast, [turns], tokenize=False)[0]).rstrip()
        except (TemplateError, ValueError, TypeError, IndexError):
            text = ""
        if found := [word for word in words if text.endswith(word)]:
            fast.eos_token = max(found, key=len)
    return fast


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a case came out: `exact`, `refused`, `told` or `wrong`, and what deviates."""

    word: str
    why: str = ""


def judge(tokenizer: Any, kind: str) -> Verdict:
    """Return whether what is trained on a conversation is what the model is served with."""
    row = conversation(kind)
    (examples,), report = Encoder(tokenizer, Encoding(8192)).encode([row])
    if report.refused:
        return Verdict("refused" if report.reason else "wrong", report.reason)
    # Without a header between them, one answer follows the end token of the other at once.
    apart = tokenizer.eos_token_id if kind == "answers in a row" else None
    runs = [(example, begin, end) for example in examples for begin, end in _runs(example, apart)]
    unasked, absent, used = list[str](), list[str](), set[int]()
    wrong = list[str]()
    for place, turn in enumerate(row.messages):
        if turn.role != "assistant":
            continue
        hits = _asked_as_served(tokenizer, row, place, runs)
        if len(hits) != 1:
            (unasked if not hits else wrong).append(f"turn {place} is trained {len(hits)} times as served")
            continue
        used.add(hits[0])
        example, begin, end = runs[hits[0]]
        text = tokenizer.decode(example.input_ids[begin:end])
        absent += [f"turn {place}: {piece!r} is not in {text!r}" for piece in _pieces(turn) if piece not in text]
        if not report.ended_within:
            wrong += _badly_ended(tokenizer, turn, text)
    for place in set(range(len(runs))) - used:
        example, begin, end = runs[place]
        unasked.append(f"also trained: {tokenizer.decode(example.input_ids[begin:end])!r}")
    if unasked and not (report.moved or report.joined or len(unasked) <= report.lost.counts["answers"]):
        wrong += unasked
    if absent and not report.unseen.rows:
        wrong += absent
    if wrong:
        return Verdict("wrong", "; ".join(wrong))
    told = bool(unasked or absent or _counts(report))
    return Verdict("told" if told else "exact", f"{_counts(report)} {'; '.join([*unasked, *absent])}" if told else "")


def _asked_as_served(tokenizer: Any, row: Conversation, place: int, runs: list[Any]) -> list[int]:
    """Return which trained stretches stand behind the prompt that a turn is served with, in any spelling."""
    folded = with_system_folded(row.messages)
    for turns, at in ((row.messages, place), (folded, place - len(row.messages) + len(folded))):
        for spelling in (USUAL, *spellings(features_of(row))):
            try:
                (ids,) = apply_template(
                    tokenizer, [table_of(turns[:at], spelling)], tokenize=True, return_dict=False,
                    add_generation_prompt=True, **options(row.tools, ""),
                )  # fmt: skip
            except (TemplateError, ValueError, TypeError, IndexError):
                continue
            hits = [n for n, (example, begin, _) in enumerate(runs) if example.input_ids[:begin].tolist() == list(ids)]
            if hits:
                return hits
    return []


def _runs(example: Example, apart: int | None) -> Iterator[tuple[int, int]]:
    """Yield the stretches of an example that have labels, and begin another after a token that sets them apart."""
    labels = [*example.labels.tolist(), IGNORED]
    begin = None
    for place, label in enumerate(labels):
        if begin is not None and (label == IGNORED or (place > begin and labels[place - 1] == apart)):
            yield begin, place
            begin = None
        if label != IGNORED and begin is None:
            begin = place


def _pieces(turn: Message) -> list[str]:
    thought, _, said = turn.content.rpartition("</think>")
    thought = thought.replace("<think>", "").strip()
    return [piece for piece in (turn.reasoning, thought, said.strip(), *(call.name for call in turn.calls)) if piece]


def _badly_ended(tokenizer: Any, turn: Message, text: str) -> Iterator[str]:
    """Yield what is wrong with an answer's end: no special token there, or the end token before it."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    if not text.endswith(tuple(special)):
        yield f"no stop at the end of {text!r}"
    elif text.count(tokenizer.eos_token) > turn.content.count(tokenizer.eos_token) + 1:
        yield f"an end token inside of {text!r}"


def _counts(report: RowReport) -> str:
    found = {name: getattr(report, name) for name in ("moved", "joined", "ended_within", "mixed", "folded")}
    lost, unseen = report.lost.counts["answers"], str(report.unseen)
    return ", ".join(f"{name} {count}" for name, count in {**found, "lost": lost, "unseen": unseen}.items() if count)


def judged(folder: Path, only: str = "") -> Iterator[tuple[str, str, Verdict]]:
    """Yield template, kind and verdict of every case of a folder's templates whose name has some words."""
    for path in sorted(folder.rglob("*.jinja")):
        if only in path.stem:
            tokenizer = tokenizer_for(path.read_text("utf-8"), path.stem)
            for kind in KINDS:
                yield path.stem, kind, judge(tokenizer, kind)


def summary(cases: list[tuple[str, str, Verdict]]) -> str:
    """Return how the cases came out: in all, and by kind."""
    words = ("exact", "told", "refused", "wrong")
    lines = [f"{'':26}" + "".join(f"{word:>9}" for word in words)]
    for kind in (*KINDS, ""):
        counts = Counter(verdict.word for _, its, verdict in cases if kind in ("", its))
        lines.append(f"{kind or 'all':26}" + "".join(f"{counts[word]:9}" for word in words))
    return "\n".join(lines)


if __name__ == "__main__":
    CASES = []
    for CASE in judged(Path(sys.argv[1]), *sys.argv[2:3]):
        CASES.append(CASE)
        if CASE[2].word != "exact":
            print(f"{CASE[0]:44} {CASE[1]:26} {CASE[2].word}: {CASE[2].why[:300]}")
    print(summary(CASES))
