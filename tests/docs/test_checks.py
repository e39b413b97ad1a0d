#!/usr/bin/env python3
"""The checks of the documentation on pages with one fault each: every one has to be found.

    test_checks.py --work FOLDER --include FOLDER --library FILE --cc CC [--flag FLAG ...]
"""
import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROGRAM = """#include <kvtile/kvtile.h>
#include <stdio.h>
int main(void) { puts(kvt_version() ? "ran" : "no"); return 0; }
"""


def fenced(language, text, comment=""):
    return (f"<!-- test: {comment} -->\n" if comment else "") + f"```{language}\n{text}```\n"


SOUND = fenced("c", PROGRAM) + "\nIt prints\n\n" + fenced("", "ran\n", "prints") + \
    fenced("sh", "test -x program_2\n", "run") + fenced("", "? * 2\n", "output") + \
    fenced("sh", "reboot\n", "not run: it needs a machine of its own") + \
    fenced("rust", "x\n", "not run: no library for it") + fenced("sh", "false\n", "run needs=no_such_program")

# name: (page, what the check has to say)
FAULTS = {
    "does_not_compile": (fenced("c", PROGRAM.replace("kvt_version", "kvt_vision")), "kvt_vision"),
    "warning": (fenced("c", PROGRAM.replace("return 0", "int unused; return 0")), "unused"),
    "exit_code": (fenced("c", PROGRAM.replace("return 0", "return 3")), "=> 3"),
    "other_output": (fenced("c", PROGRAM) + fenced("", "rang\n", "prints"), "has printed\nran"),
    "shell_fails": (fenced("sh", "false\ntrue\n", "run"), "=> 1"),
    "unmarked_shell": (fenced("sh", "true\n"), "neither run nor exempted"),
    "unmarked_text": (fenced("", "some text\n"), "neither run nor exempted"),
    "unknown_language": (fenced("rust", "x\n"), "neither run nor exempted"),
    "no_reason": (fenced("sh", "true\n", "not run"), "without a reason"),
    "unknown_word": (fenced("sh", "true\n", "rum"), "'rum'"),
    "comment_without_block": ("<!-- test: run -->\ntext\n", "no block follows"),
    "no_end": ("```c\nint main(void)\n", "has no end"),
    "no_such_surroundings": (fenced("c", "x();\n", "in=no_such.c"), "no_such.c"),
    "cmake_without_program": (fenced("cmake", "target_link_libraries(a PRIVATE b)\n"), "no program"),
}
LINK_FAULTS = {
    "missing": ("[a](nothing.md)", "does not exist"),
    "outside": ("[a](../../../../../../etc)", "leads out"),
    "anchor": ("# One\n[a](#two)", "no such heading"),
    "image": ("![a](nothing.svg)", "does not exist"),
    "attribute": ('<source srcset="nothing.svg">', "does not exist"),
    "reference": ("[a]: nothing.md", "does not exist"),
}
SOUND_LINKS = """# One, `two` & three
# One, `two` & three
[a](#one-two--three) [b](#one-two--three-1) [c](sound_links.md#one-two--three) [d](https://nowhere.invalid)
`[not](a-link.md)` <a id="here"></a> [here](#here)
"""


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", required=True)
    known, others = parser.parse_known_args()
    work = Path(known.work)
    work.mkdir(parents=True, exist_ok=True)
    wrong = []

    def expect(name, command, code, says):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")
        good = done.returncode == code and says in done.stdout
        print(f"{name}: {'as expected' if good else done.stdout}")
        if not good:
            wrong.append(name)

    def blocks(name, page, code, says, *more):
        file = work / f"{name}.md"
        file.write_text(page, encoding="utf-8")
        expect(name, [sys.executable, HERE / "check_blocks.py", file, "--work", work / name, *others,
                      "--prefix", work, *more], code, says)

    def links(name, page, code, says):
        file = work / f"{name}.md"
        file.write_text(page, encoding="utf-8")
        expect(name, [sys.executable, HERE / "check_links.py", work, file], code, says)

    blocks("sound", SOUND, 0, "6 blocks, 1 skipped, 0 failed")
    blocks("all_skipped", fenced("sh", "false\n", "run needs=no_such_program"), 77, "no no_such_program")
    secret = fenced("sh", "true\n", "run needs=encryption")
    blocks("no_encryption", secret, 77, "does not encrypt", "--encryption", "")
    blocks("encryption", secret, 0, "1 blocks, 0 skipped, 0 failed", "--encryption", "libsodium.so")
    for name, (page, says) in FAULTS.items():
        blocks(name, page, 1, says)
    links("sound_links", SOUND_LINKS, 0, "5 links of 1 pages, 0 lead nowhere")
    for name, (page, says) in LINK_FAULTS.items():
        links(name, page, 1, says)
    print(f"{len(wrong)} of {4 + len(FAULTS) + 1 + len(LINK_FAULTS)} are wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
