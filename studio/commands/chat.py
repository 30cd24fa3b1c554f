"""`lora-studio chat`: questions to a tuned model and, beside it, to its base."""

import argparse
import signal
import sys
from dataclasses import dataclass, replace
from typing import Any, TextIO

from studio.commands.options import add_device, add_json, add_runs_dir, root_of
from studio.commands.terminal import BAD_INPUT, DONE, NO, Interrupts, complain, say, write_json
from studio.core.errors import BadInput
from studio.core.text import plain
from studio.probe.chat import chat_request
from studio.runs.chat import (
    MODULE,
    Answered,
    ChatProcess,
    Conversation,
    Piece,
    Ready,
    Sampling,
    TurnDone,
    check_sampling,
    told_system,
)
from studio.runs.piped import Loading, NotAnswered
from studio.runs.system_prompt import NO_SYSTEM_PROMPT, SystemPrompt

_LONGEST_TOLD = 400
_ENDS = {"length": "cut at --max-tokens", "cancelled": "stopped", "context": "cut: the model's context is full"}
HELP = """/reset            begin a new conversation
/temperature 0.7  how freely tokens are chosen; 0 takes the likeliest (also /top_p, /top_k, /repetition_penalty, /seed)
/max 512          longest answer in tokens
/system           say which system prompt is used; /system off, /system training, or /system TEXT: a new conversation
/quit             leave (Ctrl-D too)"""
_NUMBERS = {
    "temperature": float, "top_p": float, "top_k": int, "repetition_penalty": float, "seed": int, "max_new_tokens": int,
}  # fmt: skip
_OTHER_NAMES = {"exit": "quit", "q": "quit", "new": "reset", "max": "max_new_tokens", "temp": "temperature"}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the verb."""
    parser = subparsers.add_parser(
        "chat",
        help="ask the tuned model and its base, side by side",
        description="Ask a tuned model questions and see what its base would have said. Without --prompt it is a "
        "conversation: Ctrl-C stops an answer, /help lists the commands. By default the likeliest token is taken, so "
        "that a difference comes from the tuning.",
    )
    parser.add_argument(
        "model", metavar="RUN|DIR", help="a run, a PEFT folder, a model folder (merged or not), or: embedded"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="ask this and leave; - reads it from stdin")
    parser.add_argument(
        "--system", metavar="TEXT", help="a system prompt (default: that of most rows of the training); '' for none"
    )
    parser.add_argument("--base", default="", help="the base model (default: the one that it was trained on)")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--base-only", action="store_true", help="ask the base alone")
    only.add_argument("--tuned-only", action="store_true", help="ask the tuned model alone: half the time")
    defaults = Sampling()
    parser.add_argument("--temperature", type=float, default=defaults.temperature, help="0 (default) is greedy")
    parser.add_argument("--top-p", type=float, default=defaults.top_p)
    parser.add_argument("--top-k", type=int, default=defaults.top_k, help="0 (default): no limit")
    parser.add_argument("--repetition-penalty", type=float, default=defaults.repetition_penalty)
    parser.add_argument("--max-tokens", type=int, default=defaults.max_new_tokens, help="most tokens of an answer")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="the same for both sides")
    add_device(parser)
    add_json(parser)
    add_runs_dir(parser)


def run(args: argparse.Namespace) -> int:
    """Load, ask, answer.

    Raises:
        BadInput: Nothing that can answer is named, a number is out of its range, or the question is empty or not text.
        StudioError: The process cannot be started.
    """
    sampling = check_sampling(
        Sampling(args.temperature, args.top_p, args.top_k, args.repetition_penalty, args.max_tokens, args.seed)
    )
    request = chat_request(args.model, root_of(args), base=args.base, base_only=args.base_only, device=args.device)
    if args.tuned_only:
        request = replace(request, beside="")
    to = sys.stderr if args.json else sys.stdout
    prompt = _prompt(args)
    if prompt is None and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # What started us had Ctrl-C ignored, and children inherit that; in a conversation it is a key like others.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with ChatProcess(request, module=args.modules.get("chat", MODULE)) as process:
        own = args.system if args.system is not None else request.trained_with.usual
        chat = Talk(process, Conversation(own), sampling, to, request.trained_with)
        failed = chat.load()
        if failed is None:
            chat.sides = ("tuned",) if args.tuned_only else chat.sides
            if prompt is None:
                return _converse(chat)
            failed = chat.ask(prompt)
        if failed is not None:
            complain(f"{plain(failed.message)}{f': {plain(failed.advice)}' if failed.advice else ''}")
            return BAD_INPUT if failed.bad_input else NO
        if args.json:
            system = {"system": own, "system_from": _whence(args.system, own)}
            asked = {"model": args.model, "prompt": prompt, "device": chat.device}
            write_json({**asked, "answers": chat.answers, **system})
    return DONE


def _prompt(args: argparse.Namespace) -> str | None:
    try:
        prompt = sys.stdin.read().strip() if args.prompt == "-" or _is_piped(args) else args.prompt
        for text in (
            prompt,
            args.system,
        ):  # bytes that are no UTF-8 arrive as lone surrogates, which no tokenizer reads
            (text or "").encode()
    except UnicodeError as error:
        raise BadInput("the question or the system prompt is not UTF-8 text.") from error
    if prompt is not None and not prompt.strip():
        raise BadInput("the question is empty: give it with --prompt or through stdin.")
    return str(prompt) if prompt is not None else None


def _whence(given: str | None, used: str) -> str:
    """Return where the system prompt comes from: `given`, `training` or, where none is used, `none`."""
    return "none" if not used else "training" if given is None else "given"


class Talk:
    """A conversation as a plain terminal shows it.

    Attributes:
        sides: Which models answer, in order: `base`, `tuned` or both.
        device: Where they compute.
        answers: The last answers by side: text, tokens, seconds, reason.
    """

    def __init__(
        self,
        process: ChatProcess,
        said: Conversation,
        sampling: Sampling,
        to: TextIO,
        trained_with: SystemPrompt = NO_SYSTEM_PROMPT,
    ) -> None:
        """Talk through a process.

        Args:
            process: The process of the models, which has begun to load them.
            said: What was said so far, and the system prompt.
            sampling: How to choose tokens.
            to: Where answers are written as they come.
            trained_with: What the rows of the training began with.
        """
        self.process, self.said, self.sampling = process, said, sampling
        self.trained_with = trained_with
        self.sides: tuple[str, ...] = ()
        self.device = ""
        self.answers: dict[str, dict[str, Any]] = {}
        self._to = to

    def load(self) -> NotAnswered | None:
        """Wait until the model is loaded; Ctrl-C gives up."""
        last = ""
        for event in self.process.events(until=Ready):
            if isinstance(event, Loading) and event.detail != last:
                last = event.detail
                say(f"{plain(event.detail, one_line=True)} ...", to=sys.stderr)
            elif isinstance(event, NotAnswered):
                return event
            elif isinstance(event, Ready):
                self.sides, self.device = event.sides, event.device
                for note in event.notes:
                    say(f"note: {plain(note)}", to=sys.stderr)
                if system := self.told_system():
                    say(f"note: {system}", to=sys.stderr)
        return None

    def told_system(self) -> str:
        """Return which system prompt is used, in one line; empty where there is none and none is known."""
        return plain(told_system(self.trained_with, self.said.system), one_line=True, limit=_LONGEST_TOLD)

    def ask(self, question: str) -> NotAnswered | None:
        """Ask all sides and write their answers as they come; Ctrl-C stops them."""
        self.answers, failed = {}, None
        self.process.ask({side: self.said.messages(side, question) for side in self.sides}, self.sampling)
        with Interrupts() as interrupts:

            def heed() -> None:
                if interrupts.count:
                    self.process.cancel()

            for event in self.process.events(until=TurnDone, poll=heed):
                if isinstance(event, Piece):
                    self._show(event)
                elif isinstance(event, Answered):
                    self._conclude(question, event)
                elif isinstance(event, NotAnswered):
                    failed = event
        return failed

    def _show(self, event: Piece) -> None:
        if event.side not in self.answers:
            self.answers[event.side] = {"text": ""}
            if len(self.sides) > 1:
                say(f"{event.side}:", to=self._to)
        self.answers[event.side]["text"] += event.text
        print(plain(event.text), end="", file=self._to, flush=True)

    def _conclude(self, question: str, event: Answered) -> None:
        answer = self.answers.setdefault(event.side, {"text": ""})
        answer["text"] = answer["text"].strip()
        answer |= {"tokens": event.tokens, "seconds": round(event.seconds, 3), "reason": event.reason}
        self.said.add(event.side, question, answer["text"])
        pace = f"{event.tokens} tokens, {event.tokens / max(event.seconds, 1e-6):.1f} a second"
        how = _ENDS.get(event.reason)
        dropped = f"the oldest {event.dropped_turns} turns no longer fit" if event.dropped_turns else ""
        say(f"\n  [{'; '.join(word for word in (pace, how, dropped) if word)}]", to=self._to)


@dataclass(frozen=True, slots=True)
class Command:
    """A line that begins with a slash.

    Attributes:
        name: What to do; `help` for a command that does not exist or has no number where it needs one.
        value: The number, or the system prompt, that came with it.
        text: What `help` answers.
    """

    name: str
    value: Any = 0
    text: str = ""


def read_command(line: str) -> Command | None:
    """Return the command of a line; None for a question."""
    if not line.startswith("/"):
        return None
    word, _, rest = line[1:].partition(" ")
    name = _OTHER_NAMES.get(word, word).replace("-", "_")
    if name in ("quit", "reset"):
        return Command(name)
    if name == "system":
        return Command(name, rest.strip())
    if name in _NUMBERS:
        try:
            return Command(name, _NUMBERS[name](rest))
        except ValueError:
            return Command("help", text=f"/{word} wants a number, as in: /temperature 0.7")
    return Command("help", text=HELP)


def _converse(chat: Talk) -> int:
    say("Ask something. Ctrl-C stops an answer, /help lists the commands, Ctrl-D leaves.", to=sys.stderr)
    while True:
        try:
            line = input("you: ").strip()
        except (EOFError, KeyboardInterrupt):
            say()
            return DONE
        command = read_command(line)
        if not line:
            continue
        if command is None:
            failed = chat.ask(line)
            if failed is not None:
                complain(plain(f"{failed.message} {failed.advice}"))
                if failed.fatal:
                    return NO
        elif command.name == "quit":
            return DONE
        else:
            say(_do(chat, command))


def _do(chat: Talk, command: Command) -> str:
    if command.name == "reset":
        chat.said.clear()
        return "a new conversation"
    if command.name == "system":
        if command.value:
            words = {"off": "", "none": "", "training": chat.trained_with.text}
            chat.said = Conversation(words.get(command.value, command.value))
        return chat.told_system() or "No system prompt"
    if command.name in ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens", "seed"):
        changed = replace(chat.sampling, **{command.name: command.value})
        if problems := changed.problems():
            return " ".join(problems)
        chat.sampling = changed
        return f"{command.name} is {command.value:g}"
    return command.text


def _is_piped(args: argparse.Namespace) -> bool:
    """Return whether stdin holds the one question: there is no --prompt, and no conversation is possible or wanted."""
    return args.prompt is None and (args.json or not sys.stdin.isatty())
