"""Reads a Modelfile by the rules of Ollama's own reader: commands, comments, one or three quotes, no escapes."""

_COMMANDS = {"from", "license", "template", "system", "adapter", "parameter", "message"}


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """Return commands in lower case, parameters by their own names, with their values.

    Raises:
        ValueError: Ollama would refuse it.
    """
    found: list[tuple[str, str]] = []
    lines = iter(text.split("\n"))
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        command, _, value = line.partition(" ")
        if command.lower() not in _COMMANDS:
            raise ValueError(f"no command: {line!r}")
        name = command.lower()
        if name == "parameter":
            name, _, value = value.partition(" ")
        while (inner := _unquoted(value.strip())) is None:
            try:
                value += "\n" + next(lines)
            except StopIteration:
                raise ValueError(f"a text without an end: {value[:40]!r}") from None
        found.append((name, "".join(letter for letter in inner if letter.isprintable() or letter in "\n\r\t")))
    if not any(name == "from" for name, _ in found):
        raise ValueError("no FROM line")
    return found


def _unquoted(text: str) -> str | None:
    for quotes in ('"""', '"'):
        if text.startswith(quotes):
            whole = len(text) >= 2 * len(quotes) and text.endswith(quotes)
            return text[len(quotes) : -len(quotes)] if whole else None
    return text
