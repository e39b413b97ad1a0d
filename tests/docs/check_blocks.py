#!/usr/bin/env python3
"""Build and run the code blocks of one Markdown page (see blocks.py).

    check_blocks.py PAGE --work FOLDER --include FOLDER --library FILE [--cc CC] [--cxx CXX] ...

Blocks run in order in an empty folder, so that a block finds the files of those before it. A block
that is neither run nor exempted is a failure; so is a page whose blocks cannot be told. Exit code:
0 all passed, 1 a failure, 77 nothing could be run here.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import blocks as markdown

HERE = Path(__file__).resolve().parent
TIMEOUT_S = 300
C_FLAGS = ["-Wall", "-Wextra", "-Werror"]


class Failure(Exception):
    pass


class Skip(Exception):
    pass


def needs_of(block):
    return [need for need in block.values.get("needs", "").split(",") if need]


class Page:
    def __init__(self, options):
        self.options = options
        self.work = Path(options.work)
        self.printed = None  # by the last block that was run
        self.program = None  # source of the last C block
        self.shift = 0  # lines by which --update has moved the rest of the page
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        self.environment = dict(os.environ)
        for variable in ("CFLAGS", "CXXFLAGS", "LDFLAGS", "DESTDIR", "CMAKE_PREFIX_PATH"):
            self.environment.pop(variable, None)
        self.environment["PATH"] = ":".join(options.path + [os.environ.get("PATH", "")])
        if options.library:
            folder = os.path.dirname(options.library)
            self.environment["LD_LIBRARY_PATH"] = folder
            self.environment["KVTILE_LIBRARY"] = options.library
        if options.prefix:
            pkgconfig = [str(p) for p in Path(options.prefix).glob("lib*/**/pkgconfig")]
            self.environment["PKG_CONFIG_PATH"] = ":".join(pkgconfig)
        if options.python_path:
            self.environment["PYTHONPATH"] = ":".join(options.python_path)

    def command(self, arguments, **more):
        try:
            done = subprocess.run(arguments, cwd=self.work, env=self.environment, timeout=TIMEOUT_S,
                                  stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, encoding="utf-8", errors="replace", **more)
        except subprocess.TimeoutExpired:
            raise Failure(f"still running after {TIMEOUT_S} s")
        if done.returncode != 0:
            raise Failure(f"{' '.join(map(str, arguments))}\n{done.stdout}{done.stderr}"
                          f"=> {done.returncode}")
        return done.stdout

    def source(self, block, suffix):
        """The block's text, within its surroundings, in a file."""
        text = block.text
        if "file" in block.values:
            (self.work / block.values["file"]).write_text(text, encoding="utf-8")
        if suffix != ".py":  # compilers name the page's own lines
            text = f'#line {block.line} "{self.options.page}"\n{text}'
        surroundings = block.values.get("in")
        if surroundings:
            try:
                template = (HERE / surroundings).read_text(encoding="utf-8")
            except FileNotFoundError:
                raise Failure(f"there is no tests/docs/{surroundings}")
            parts = re.split(r"^[ \t]*(?:/\*|#) BLOCK(?: \*/)?\n", template, flags=re.M)
            if len(parts) != 2:
                raise Failure(f"tests/docs/{surroundings} has not one comment BLOCK")
            before, after = parts
            text = before + text + after
        path = self.work / f"block_{block.line}{suffix}"
        path.write_text(text, encoding="utf-8")
        return path

    def compiled(self, block, compiler, standard, suffix):
        if not compiler:
            raise Skip("no compiler")
        source = self.source(block, suffix)
        program = self.work / f"program_{block.line}"
        folder = os.path.dirname(self.options.library)
        self.command([compiler, f"-std={standard}", *C_FLAGS, *self.options.flag,
                      f"-I{self.options.include}", f"-I{HERE}", source, "-o", program, self.options.library,
                      f"-Wl,-rpath,{folder}", "-pthread", "-lm",
                      *([self.options.encryption] if "encryption" in needs_of(block) else [])])
        self.program = source
        return self.command([program])

    def c(self, block):
        return self.compiled(block, self.options.cc, "c11", ".c")

    def cpp(self, block):
        if not (Path(self.options.include) / "kvtile/kvtile.hpp").exists():
            raise Skip("no kvtile.hpp")
        return self.compiled(block, self.options.cxx, "c++17", ".cpp")

    def python(self, block):
        for module in re.findall(r"^\s*(?:import|from) +(\w+)", block.text, re.M):
            found = subprocess.run([self.options.python, "-c", f"import {module}"],
                                   env=self.environment, cwd=self.work, capture_output=True)
            if found.returncode != 0:
                raise Skip(f"no Python module {module}")
        return self.command([self.options.python, self.source(block, ".py")])

    def cmake(self, block):
        """A consumer's lines: with a program's target, that of the last C block, around them."""
        if not self.options.prefix:
            raise Skip("kvtile is not installed by this build")
        text = block.text
        if "project(" not in text:
            target = re.search(r"target_link_libraries\(\s*(\w+)", text)
            if not target or not self.program:
                raise Failure("no target, or no program of it on this page")
            text = (f"cmake_minimum_required(VERSION 3.25)\nproject(consumer LANGUAGES C)\n"
                    f"add_executable({target[1]} {self.program})\n{text}")
        folder = self.work / f"cmake_{block.line}"
        folder.mkdir()
        (folder / "CMakeLists.txt").write_text(text, encoding="utf-8")
        self.command(["cmake", "-S", folder, "-B", folder / "build", "-G", self.options.generator,
                      f"-DCMAKE_MAKE_PROGRAM={self.options.make_program}",
                      f"-DCMAKE_C_COMPILER={self.options.cc}",
                      f"-DCMAKE_PREFIX_PATH={self.options.prefix}"])
        return self.command(["cmake", "--build", folder / "build"])

    def sh(self, block):
        if "run" not in block.words:
            raise Failure("a shell block that is neither run nor exempted")
        return self.command(["bash", "-euo", "pipefail", "-c", block.text])

    RUNNERS = {"c": c, "cpp": cpp, "c++": cpp, "python": python, "cmake": cmake, "sh": sh, "bash": sh}

    def replace(self, block):
        """Write what was printed into the page."""
        path = Path(self.options.page)
        lines = path.read_text(encoding="utf-8").split("\n")
        start = block.line - 1 + self.shift
        lines[start:start + block.text.count("\n")] = self.printed.splitlines()
        self.shift += self.printed.count("\n") - block.text.count("\n")
        path.write_text("\n".join(lines), encoding="utf-8")

    def check(self, block):
        """Run one block; what to say of it."""
        if block.reason:
            return f"not run: {block.reason}"
        if "prints" in block.words:
            if self.printed is None:
                raise Skip("the block before it was not run")
            if self.printed != block.text and self.options.update:
                self.replace(block)
                return "updated"
            if self.printed != block.text:
                raise Failure(f"the block before it has printed\n{self.printed}")
            return "as printed"
        if "output" in block.words:
            return "output"
        self.printed = None
        run = self.RUNNERS.get(block.language)
        if not run:
            raise Failure("a block that is neither run nor exempted")
        for need in needs_of(block):
            if need == "installation":
                if not self.options.prefix:
                    raise Skip("kvtile is not installed by this build")
            elif need == "encryption":
                if not self.options.encryption:
                    raise Skip("this build does not encrypt")
            elif not (shutil.which(need, path=self.environment["PATH"]) or (self.work / need).exists()):
                raise Skip(f"no {need}")
        self.printed = run(self, block)
        return "run"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("page")
    parser.add_argument("--work", required=True, help="a folder that is emptied first")
    parser.add_argument("--include", default="")
    parser.add_argument("--library", default="", help="the shared library")
    parser.add_argument("--prefix", default="", help="where kvtile is installed")
    parser.add_argument("--encryption", default="", help="libsodium, where kvtile has it")
    parser.add_argument("--cc", default="cc")
    parser.add_argument("--cxx", default="")
    parser.add_argument("--flag", action="append", default=[], help="for the compilers")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--python-path", action="append", default=[])
    parser.add_argument("--path", action="append", default=[], help="folders of programs")
    parser.add_argument("--generator", default="Ninja")
    parser.add_argument("--make-program", default="ninja")
    parser.add_argument("--update", action="store_true",
                        help="write what the blocks print into the page")
    options = parser.parse_args()
    options.page = os.path.abspath(options.page)

    try:
        blocks = markdown.read(options.page)
    except markdown.PageError as error:
        print(error)
        return 1
    page = Page(options)
    passed = skipped = failed = 0
    for block in blocks:
        where = f"{options.page}:{block.line} ({block.language or 'text'})"
        try:
            print(f"{where}: {page.check(block)}", flush=True)
            passed += 1
        except Skip as skip:
            print(f"{where}: skipped: {skip}", flush=True)
            skipped += 1
        except Failure as failure:
            print(f"{where}: FAILED: {failure}", flush=True)
            failed += 1
    print(f"{passed} blocks, {skipped} skipped, {failed} failed")
    if failed:
        return 1
    return 77 if skipped and not passed else 0


if __name__ == "__main__":
    sys.exit(main())
