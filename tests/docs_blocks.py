"""The fenced blocks of a Markdown page, and the commands in them.

Marks after the language say what the tests do with a block: none runs it, ``check-only`` only parses its commands (for
models that are too large to run here), ``no-run`` leaves it out and must be in the test's list.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^ *```(?P<language>[\w+-]*)(?P<marks>[^\n]*)\n(?P<body>.*?)^ *```$", re.MULTILINE | re.DOTALL)
SHELL = ("bash", "console", "sh")
_PROGRAMS = ("sordino ", "make ", "python ", "pip ", "cd ", ".venv/bin/")  # what a block without a language is known by


@dataclass(frozen=True)
class Block:
    """One fenced block: its language ("" if it names none), the marks behind it, its text."""

    language: str
    marks: tuple[str, ...]
    body: str

    @property
    def title(self) -> str | None:
        """The file that a block shows, from ``title="mine.toml"``."""
        return next((m.partition("=")[2].strip('"') for m in self.marks if m.startswith("title=")), None)

    @property
    def commands(self) -> list[list[str]]:
        """The words of every command, without comments; of a block with output, the lines behind a ``$``."""
        lines = re.sub(r"\\\n\s*", " ", self.body).splitlines()
        prompted = any(line.startswith("$ ") for line in lines)
        named = any(line.removeprefix("$ ").startswith(_PROGRAMS) for line in lines)
        if self.language not in SHELL and not (self.language == "" and named):
            return []
        kept = [line[2:] if prompted else line for line in lines if line.startswith("$ ") or not prompted]
        return [words for line in kept if (words := shlex.split(line, comments=True))]


def blocks(page: Path | str) -> list[Block]:
    """All fenced blocks of a page (a file, or its text), in order."""
    found = _FENCE.finditer(page if isinstance(page, str) else page.read_text(encoding="utf-8"))
    return [Block(m["language"], tuple(m["marks"].split()), m["body"]) for m in found]
