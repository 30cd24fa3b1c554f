"""Lets the forms of a trained model answer held-out prompts, and scores the answers by rules.

Answers are greedy and made one prompt at a time, so that an answer does not depend on what else is asked. Each complete
answer is written to disk: an audit that was stopped or killed continues with the next one.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from studio.core.answers import Answer, Check, checks_for, score_answers
from studio.core.errors import JobFailed, StudioError
from studio.core.events import Phase, Warned
from studio.jobs.audit.answer_models import AnswerModel, AnswerModels
from studio.jobs.audit.kept import KeptPart
from studio.jobs.base.data.rows import Prompt, sample_prompts
from studio.jobs.base.data.template import ensure_template
from studio.jobs.base.failures import Cancelled
from studio.jobs.base.generation import greedy
from studio.jobs.base.progress import heed
from studio.jobs.base.tokenizer import load_tokenizer, stop_ids
from studio.probe.audit import rows_to_measure
from studio.probe.data import PlainText
from studio.runs.failure import ran_out_of_memory
from studio.runs.layout import RunPaths
from studio.runs.requests import AuditRequest
from studio.runs.worker import Worker

_MOST_TOKENS = 512
_ROOM = 1.5
"""Most tokens of an answer, over the longest held-out answer: enough to see that a model does not stop."""
_SPARE_TOKENS = 16

Given = dict[str, list[Answer]]
"""Each form's answers, in the order of the prompts."""


def audit_answers(worker: Worker, request: AuditRequest) -> dict[str, Any]:
    """Let every form answer, score the answers, and return their part of the report.

    Raises:
        BadInput: The run, its base or its data cannot be used.
        JobFailed: No prompt is short enough, or no form can be loaded here.
        Cancelled: The user asked for a stop; complete answers are kept.
    """
    tokenizer = load_tokenizer(RunPaths(Path(request.run)).adapter)
    found = rows_to_measure(request)
    ensure_template(tokenizer, found.format, lambda text: None)
    held = found.rows
    prompts = sample_prompts(held, tokenizer, request.answers, seq_len=request.seq_len)
    if not prompts:
        raise JobFailed(
            "no_prompt", "no held-out row has a prompt that fits", "raise train.seq_len, or ask for no answers"
        )
    models = AnswerModels.of(request)
    most = request.answer_tokens or _longest(prompts, tokenizer)
    part = KeptPart(worker, request, "answers", [list(prompt.input_ids) for prompt in prompts], most, str(models.dtype))
    asking = _Asking(worker, models, tokenizer, prompts, most=most, part=part)
    forms = models.forms(request.merged)
    given, left_out = asking.all(forms)
    texts = [] if isinstance(held[0], PlainText) else [prompt.expected for prompt in prompts]
    reference = models.trained if models.trained in given else next(iter(given))
    checks = checks_for(texts, request.check_regex)
    return {
        "prompts": len(prompts),
        "reference": reference,
        "trained": models.trained,
        "new_tokens": most,
        "dtype": str(models.dtype).removeprefix("torch."),
        "device": str(models.device),
        "forms": [{"name": form.name, "title": form.title, "why_not": left_out.get(form.name, "")} for form in forms],
        "rows": _rows(prompts, given, checks),
        "checks": _scores(checks, given, prompts, reference),
    }


class _Asking:
    """Asks one form after another, and writes every answer to disk."""

    def __init__(
        self,
        worker: Worker,
        models: AnswerModels,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        *,
        most: int,
        part: KeptPart,
    ) -> None:
        self._worker, self._models, self._tokenizer = worker, models, tokenizer
        self._prompts, self._most, self._part = prompts, most, part
        self._kept: Given = {name: [Answer(**one) for one in known] for name, known in (part.load() or {}).items()}

    def all(self, forms: Sequence[AnswerModel]) -> tuple[Given, dict[str, str]]:
        """Return the answers by form, and for forms that gave none the reason."""
        left_out: dict[str, str] = {}
        for place, form in enumerate(forms):
            if len(self._kept.get(form.name, ())) == len(self._prompts):
                continue
            reason = self._models.why_not(form) or self._ask(form, (place, len(forms)))
            self._models.release()
            if reason:
                left_out[form.name] = reason
                self._kept.pop(form.name, None)
                self._worker.emit(Warned, topic="audit", message=f"{form.name} gives no answers: {reason}")
        if not self._kept:
            raise JobFailed("no_answers", "no form of the model could be loaded to answer", "audit with --answers 0")
        return {form.name: self._kept[form.name] for form in forms if form.name in self._kept}, left_out

    def _ask(self, form: AnswerModel, place: tuple[int, int]) -> str:
        """Let a form answer the prompts that it has not answered yet; return why it cannot, empty where it can."""
        done = self._kept.setdefault(form.name, [])
        self._tell(place, len(done), f"{form.name}: loading")
        try:
            model = form.open().eval()
            stops = stop_ids(self._tokenizer, getattr(model, "generation_config", None))
            for prompt in self._prompts[len(done) :]:
                self._tell(place, len(done), f"{form.name}: {len(done) + 1} of {len(self._prompts)}")
                done.append(self._answer(model, prompt, stops))
                self._keep()
        except Cancelled:
            raise
        except (MemoryError, RuntimeError, OSError) as error:
            if not ran_out_of_memory(error):
                raise
            return "memory was not enough"
        except StudioError as error:
            return str(error)
        return ""

    def _answer(self, model: Any, prompt: Prompt, stops: Sequence[int]) -> Answer:
        made = greedy(model, prompt.input_ids, stops=stops, new_tokens=self._most, cancelled=self._stopping)
        heed(self._worker, "stopped; resuming goes on after the last whole answer")
        stopped = bool(made) and made[-1] in stops
        text = str(self._tokenizer.decode(made, skip_special_tokens=True)).strip()
        return Answer(text, len(made) - stopped, stopped)

    def _stopping(self) -> bool:
        return self._worker.requested("stop")

    def _tell(self, place: tuple[int, int], done: int, detail: str) -> None:
        fraction = (place[0] + done / len(self._prompts)) / place[1]
        self._worker.emit(Phase, name="answering", fraction=fraction, detail=detail)

    def _keep(self) -> None:
        self._part.keep({name: [asdict(answer) for answer in answers] for name, answers in self._kept.items()})


def _longest(prompts: Sequence[Prompt], tokenizer: Any) -> int:
    longest = max(len(ids) for ids in tokenizer([prompt.expected for prompt in prompts]).input_ids)
    return min(_MOST_TOKENS, int(longest * _ROOM) + _SPARE_TOKENS)


def _rows(prompts: Sequence[Prompt], given: Given, checks: Sequence[Check]) -> list[dict[str, Any]]:
    return [
        {
            "prompt": prompt.text,
            "expected": prompt.expected,
            "answers": {
                name: {
                    **asdict(answers[place]),
                    "scores": {check.name: check.score(answers[place], prompt.expected) for check in checks},
                }
                for name, answers in given.items()
            },
        }
        for place, prompt in enumerate(prompts)
    ]


def _scores(checks: Sequence[Check], given: Given, prompts: Sequence[Prompt], reference: str) -> list[dict[str, Any]]:
    expected = [prompt.expected for prompt in prompts]
    return [
        {
            "name": check.name,
            "how": check.how,
            "scores": {name: asdict(score) for name, score in score_answers(check, given, expected, reference).items()},
        }
        for check in checks
    ]
