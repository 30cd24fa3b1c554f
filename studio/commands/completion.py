"""`lora-studio completion`: scripts for bash, zsh and fish, and a manual page, made from the program's own parser."""

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass

from studio import __version__
from studio.commands.options import add_runs_dir, root_of
from studio.commands.terminal import DONE, say
from studio.core.errors import BadInput

_SHELLS = ("bash", "zsh", "fish", "man")
_LIVE = ("runs", "recipes")
_HOW = {
    "bash": "lora-studio completion bash > ~/.local/share/bash-completion/completions/lora-studio",
    "zsh": 'lora-studio completion zsh > "${fpath[1]}/_lora-studio"',
    "fish": "lora-studio completion fish > ~/.config/fish/completions/lora-studio.fish",
    "man": "lora-studio completion man > ~/.local/share/man/man1/lora-studio.1",
}


@dataclass(frozen=True, slots=True)
class _Option:
    """An option or an argument of a verb.

    Attributes:
        names: Its flags; empty for an argument.
        metavar: The word for its value; empty where it takes none.
        words: The values that it may have; empty where others are allowed.
        help: What it does.
        needed: Whether it must be given.
    """

    names: tuple[str, ...]
    metavar: str
    words: tuple[str, ...]
    help: str
    needed: bool = False


@dataclass(frozen=True, slots=True)
class _Verb:
    """A verb, with its words behind the program's name: `("runs", "list")`."""

    words: tuple[str, ...]
    help: str
    description: str
    options: tuple[_Option, ...]
    verbs: tuple[tuple[str, str], ...]

    @property
    def path(self) -> str:
        """The words with spaces between."""
        return " ".join(self.words)

    @property
    def flags(self) -> tuple[str, ...]:
        """All flags that it takes."""
        return tuple(name for option in self.options for name in option.names)

    @property
    def places(self) -> tuple[_Option, ...]:
        """What it takes without a flag."""
        return tuple(option for option in self.options if not option.names)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the verb."""
    parser = subparsers.add_parser(
        "completion",
        help="completion for bash, zsh and fish, and a manual page",
        description="Prints a script for a shell, or the manual page. "
        + "; ".join(f"{shell}: {how}" for shell, how in _HOW.items()),
    )
    parser.add_argument("shell", choices=_SHELLS, nargs="?", help="what to print")
    parser.add_argument("--names", choices=_LIVE, help="print the names of runs or recipes, one a line")
    add_runs_dir(parser)


def run(args: argparse.Namespace) -> int:
    """Print a script, the manual page, or names.

    Raises:
        BadInput: Nothing was asked for.
    """
    if args.names:
        for name in _names(args):
            say(name)
        return DONE
    if args.shell is None:
        raise BadInput(f"wanted one of {', '.join(_SHELLS)}; for example: {_HOW['bash']}")
    verbs = list(_verbs(args.whole_parser(), (), ""))
    make = {"bash": _bash, "zsh": _zsh, "fish": _fish, "man": _man}[args.shell]
    print("\n".join(make(verbs)))
    return DONE


def _names(args: argparse.Namespace) -> list[str]:
    """Return names as fast as they can be had: a shell waits for them at every press of tab."""
    if args.names == "recipes":
        from studio.runs.recipe_file import shipped_recipes  # noqa: PLC0415  10 ms that names of runs need not pay

        return list(shipped_recipes())
    try:
        folders = [path for path in root_of(args).iterdir() if not path.name.startswith(".") and path.is_dir()]
    except OSError:
        folders = []
    return [*sorted(path.name for path in folders), "last"]


def _verbs(parser: argparse.ArgumentParser, words: tuple[str, ...], told: str) -> Iterator[_Verb]:
    """Yield the program and each of its verbs, those of verbs behind them."""
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    helps = {choice.dest: choice.help or "" for each in inner for choice in each._choices_actions}
    options = tuple(_option(parser, action) for action in parser._actions if action not in inner)
    below = {name: child for each in inner for name, child in each.choices.items()}
    description = " ".join((parser.description or "").split())
    yield _Verb(words, told, description, options, tuple((name, helps.get(name, "")) for name in below))
    for name, child in below.items():
        yield from _verbs(child, (*words, name), helps.get(name, ""))


def _option(parser: argparse.ArgumentParser, action: argparse.Action) -> _Option:
    takes = action.nargs != 0 and not isinstance(action, argparse.BooleanOptionalAction)
    words = tuple(map(str, action.choices)) if takes and action.choices else ()
    shown = action.metavar if isinstance(action.metavar, str) else "|".join(words) or action.dest.upper()
    told = " ".join(parser._get_formatter()._expand_help(action).split()) if action.help else ""
    needed = action.required if action.option_strings else action.nargs not in ("?", "*")
    return _Option(tuple(action.option_strings), shown if takes else "", words, told, needed)


def _wanted(option: _Option) -> str:
    """Return what stands for a value: `runs`, `recipes`, or `files`; empty for a number, a name or the like."""
    if re.search(r"\bRUN\b|WHAT", option.metavar):
        return "runs"
    if option.metavar == "RECIPE" and "--out" not in option.names:
        return "recipes"
    files = ("FILE", "DIR", "M", "MODEL", "PATH", "RECIPE", "TEXT_FILE")
    return "files" if any(word in files for word in re.split(r"\W+", option.metavar)) else ""


def _bash(verbs: list[_Verb]) -> Iterator[str]:
    yield f"# bash completion of lora-studio {__version__}: {_HOW['bash']}"
    yield from _bash_function(verbs)
    yield "complete -o filenames -F _lora_studio lora-studio"


def _bash_function(verbs: list[_Verb]) -> Iterator[str]:
    yield "_lora_studio() {"
    yield '  local cur="${COMP_WORDS[COMP_CWORD]}" prev="${COMP_WORDS[COMP_CWORD-1]}" verb="" words="" want="" i'
    yield "  for ((i = 1; i < COMP_CWORD; i++)); do"
    yield '    case "$verb ${COMP_WORDS[i]}" in'
    known = [f'"{" ".join(one.words[:-1])} {one.words[-1]}"' for one in verbs if one.words]
    yield f'      {"|".join(known)}) verb="${{verb:+$verb }}${{COMP_WORDS[i]}}" ;;'
    yield "    esac"
    yield "  done"
    yield '  case "$verb:$prev" in'
    for one in verbs:
        for option in one.options:
            if option.names and option.metavar:
                names = "|".join(f'"{one.path}:{name}"' for name in option.names)
                yield f"    {names}) {_bash_wants(option)} ;;"
    yield '    *) case "$verb" in'
    for one in verbs:
        words = " ".join((*(name for name, _ in one.verbs), *one.flags))
        places = "; ".join(filter(None, map(_bash_place, one.places)))
        yield f'      "{one.path}") words="{words}"{f"; {places}" if places else ""} ;;'
    yield "    esac ;;"
    yield "  esac"
    yield '  case "$want" in'
    for kind in _LIVE:
        yield f'    *{kind}*) words="$words $(lora-studio completion --names {kind} 2>/dev/null)" ;;'
    yield "  esac"
    yield '  COMPREPLY=($(compgen -W "$words" -- "$cur"))'
    yield '  case "$cur:$want" in'
    yield "    -*:*) ;;"
    yield '    *:*files*|*:*recipes*) COMPREPLY+=($(compgen -f -- "$cur")) ;;'
    yield "  esac"
    yield "}"


def _bash_wants(option: _Option) -> str:
    if option.words:
        return f'words="{" ".join(option.words)}"'
    return f'want="{_wanted(option)}"'


def _bash_place(option: _Option) -> str:
    if option.words:
        return f'words="$words {" ".join(option.words)}"'
    return f'want="$want {kind}"' if (kind := _wanted(option)) else ""


def _zsh(verbs: list[_Verb]) -> Iterator[str]:
    """Yield a script that takes bash's function: zsh runs such functions itself."""
    yield "#compdef lora-studio"
    yield f"# zsh completion of lora-studio {__version__}: {_HOW['zsh']}"
    yield "autoload -U +X bashcompinit && bashcompinit"
    yield from _bash_function(verbs)
    yield "complete -o filenames -F _lora_studio lora-studio"
    yield "# The first time, zsh reads this file as the function that completes."
    yield '[[ "${funcstack[1]}" = "_lora-studio" ]] && _bash_complete -o filenames -F _lora_studio'


def _fish(verbs: list[_Verb]) -> Iterator[str]:
    yield f"# fish completion of lora-studio {__version__}: {_HOW['fish']}"
    yield "function __lora_studio_at"
    yield "    set -l said (commandline -opc)[2..]"
    yield "    set -l verbs"
    yield "    for word in $said"
    yield '        contains -- (string trim -- "$verbs $word") $__lora_studio_verbs; and set -a verbs $word'
    yield "    end"
    yield '    test "$verbs" = "$argv"'
    yield "end"
    yield f"set -g __lora_studio_verbs {' '.join(_quoted(one.path) for one in verbs if one.words)}"
    yield "complete -c lora-studio -f"
    for one in verbs:
        here = f"-n {_quoted(f'__lora_studio_at {one.path}'.rstrip())}"
        for name, told in one.verbs:
            yield f"complete -c lora-studio {here} -a {name} -d {_quoted(told)}"
        for option in one.options:
            yield f"complete -c lora-studio {here} {_fish_option(option)}"


def _fish_option(option: _Option) -> str:
    flags = " ".join(f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names)
    if not option.metavar:
        return f"{flags} -d {_quoted(option.help)}"
    kind = _wanted(option)
    live = f"(lora-studio completion --names {kind} 2>/dev/null)" if kind in _LIVE else ""
    values = " ".join(option.words) or live
    takes_files = kind in ("files", "recipes")
    needs = ("-r -F " if takes_files else "-x ") if option.names else ("-F " if takes_files else "")
    return f"{flags} {needs}{f'-a {_quoted(values)} ' if values else ''}-d {_quoted(option.help)}".strip()


def _quoted(text: str) -> str:
    """Return a text between single quotes, as fish and other shells read it."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _man(verbs: list[_Verb]) -> Iterator[str]:
    """Yield the manual page in roff."""
    program, *rest = verbs
    yield f'.TH LORA-STUDIO 1 "" "lora-studio {__version__}" "User Commands"'
    yield ".SH NAME"
    yield r"lora\-studio \- fine-tune language models with LoRA and QLoRA in a terminal"
    yield ".SH SYNOPSIS"
    yield r".B lora\-studio"
    yield r"[\fIVERB\fR] [\fIOPTIONS\fR]"
    yield ".SH DESCRIPTION"
    yield _roff(program.description)
    yield from _man_options(program)
    yield ".SH VERBS"
    for one in rest:
        yield f".SS {_roff(' '.join((one.path, *_man_places(one))))}"
        yield _roff(one.description or f"{one.help[:1].upper()}{one.help[1:]}.")
        yield from _man_options(one)
    yield ".SH EXIT STATUS"
    for code, told in (("0", "Done, or it fits."), ("1", "The answer is no: it failed, or does not fit."),
                       ("2", "The input cannot be used."), ("130", "Interrupted.")):  # fmt: skip
        yield f".TP\n.B {code}\n{told}"
    yield ".SH ENVIRONMENT"
    for name, told in (("LORA_STUDIO_HOME", "Where runs, settings and caches lie."),
                       ("HF_HOME, HF_TOKEN", "Cache and token of the hub."), ("NO_COLOR", "No colours.")):  # fmt: skip
        yield f".TP\n.B {name}\n{told}"


def _man_places(verb: _Verb) -> list[str]:
    return [option.metavar if option.needed else f"[{option.metavar}]" for option in verb.places]


def _man_options(verb: _Verb) -> Iterator[str]:
    for option in verb.options:
        if "-h" in option.names and verb.words:
            continue
        value = f" {option.metavar}" if option.names and option.metavar else ""
        yield f".TP\n.B {_roff(', '.join(f'{name}{value}' for name in option.names) or option.metavar)}"
        yield _roff(option.help or " ")


def _roff(text: str) -> str:
    """Return a text in which roff obeys nothing: hyphens stay hyphens, and no line begins with a dot or a quote."""
    safe = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{safe}" if safe[:1] in (".", "'") else safe
