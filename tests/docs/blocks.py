"""The fenced code blocks of a Markdown page, and what its comments say about them.

A comment on the line before a block says how it is tested:

    <!-- test: run -->               a shell block, run with bash in the page's folder
    <!-- test: file=NAME -->         written to NAME in the page's folder as well, for later blocks
    <!-- test: in=NAME -->           a part of a program: put into tests/docs/NAME in place of its comment BLOCK
    <!-- test: needs=A,B -->         skipped where one of these, a program or a file of the page's folder,
                                     is not found; "installation": of this build, for pkg-config;
                                     "encryption": in this build; libsodium is linked
    <!-- test: prints -->            what the block before it, which was run, has printed
    <!-- test: output -->            what a program has printed: nothing to run
    <!-- test: not run: REASON -->   nothing to run, for this reason

Several words can stand in one comment. C, C++, CMake and Python blocks are run without one.
"""
import re
from dataclasses import dataclass, field


class PageError(Exception):
    """A block that says nothing, or nonsense, about how it is tested."""


@dataclass
class Block:
    line: int  # of its first line of text
    language: str
    text: str
    words: set = field(default_factory=set)
    values: dict = field(default_factory=dict)
    reason: str = ""  # why it is not run

    @property
    def exempt(self):
        return bool(self.reason) or bool(self.words & {"output", "prints"})


WORDS = {"run", "output", "prints"}
VALUES = {"file", "in", "needs"}
DIRECTIVE = re.compile(r"\s*<!--\s*test:\s*(.*?)\s*-->\s*$")
FENCE = re.compile(r"( {0,3})(`{3,}|~{3,})\s*([^`]*)$")


def read_directive(block, text, where):
    if text.startswith("not run"):
        block.reason = text[len("not run"):].lstrip(":").strip()
        if len(block.reason) < 10:
            raise PageError(f"{where}: 'not run' without a reason")
        return
    for word in text.split():
        name, equals, value = word.partition("=")
        if equals and name in VALUES and value:
            block.values[name] = value
        elif not equals and name in WORDS:
            block.words.add(name)
        else:
            raise PageError(f"{where}: '{word}' says nothing about a test")


def read(path):
    """All blocks of a page, in order. Raises PageError."""
    blocks, before, fence, lines = [], "", None, []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file.read().split("\n"), 1):
            if fence:
                if re.match(rf" {{0,3}}{re.escape(fence[0])}{{{len(fence)},}}\s*$", line):
                    blocks[-1].text = "".join(text + "\n" for text in lines)
                    fence = None
                else:
                    lines.append(line)
                continue
            opening = FENCE.match(line)
            if opening:
                fence, lines = opening[2], []
                info = opening[3].split()
                blocks.append(Block(number + 1, info[0] if info else "", ""))
                directive = DIRECTIVE.match(before)
                if directive:
                    read_directive(blocks[-1], directive[1], f"{path}:{number - 1}")
            elif DIRECTIVE.match(before) and line.strip():
                raise PageError(f"{path}:{number}: no block follows the comment above")
            elif "test:" in line and "<!--" in line and not DIRECTIVE.match(line):
                raise PageError(f"{path}:{number}: a comment on a test takes a line of its own")
            before = line if line.strip() or not DIRECTIVE.match(before) else before
    if fence:
        raise PageError(f"{path}:{blocks[-1].line}: the block has no end")
    return blocks
