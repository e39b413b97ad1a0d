#!/usr/bin/env python3
"""Doxygen's view of a public header: its plain comments as documentation.

    filter.py HEADER

Prints the header with these changes and as many lines as before where it can:

  - a comment behind code on its line belongs to that code, one above a declaration to that
    declaration; a declaration on the line behind another one shares its comment
  - "KVT_ERR_ARG  text" in a function's comment is a return value, "name: text" a list's item
  - a field without a comment is documented by its struct's, if that names it, or says "fields as
    in X"; fields with a trailing underscore are the library's own

The comment at kvtile.h's beginning is the main page, another header's is about that file.
A comment with a blank line behind it, and a line /* ---- ... ---- */, are notes to the reader of the
header and stay plain comments.
"""
import os
import re
import sys

COMMENT = re.compile(r"/\*.*?\*/", re.S)
STATUSES = r"KVT_(?:OK|ERR_[A-Z]+)"


def marked_up(text):
    """A comment's inside, with the header's tables as lists."""
    text = re.sub(r" \.\.(?=\s)", " to", text)  # a line of a point ends doxygen's lists
    lines = []
    for line in text.split("\n"):
        match = re.match(rf"^( \*|) *({STATUSES}(?:, {STATUSES})*)(?:(?::| ) *(\S.*)|)$", line)
        if match and (match[3] or "," in match[2]) and not match[3] == "as":
            line = f"{match[1]} - {match[2]}" + (f": {match[3]}" if match[3] else "")
        else:
            match = re.match(r"^ \* {1,2}([a-z_]+(?:, [a-z_]+)*|\(none\)|KVT_ATTEND_[A-Z0-9]+)(?:: | {2,})(\S.*)$", line)
            if match:
                line = f" * - {match[1]}: {match[2]}"
            elif re.match(r"^ \* {4,}\S", line):  # goes on with the item above
                line = " *   " + line[2:].strip()
        lines.append(line)
    return "\n".join(lines)


def comments(source, file):
    """The header with its comments turned into documentation where they belong to something."""
    out, end = [], 0
    code = COMMENT.sub("", source)
    functions = set(re.findall(r"\b(kvt_\w+)\([^;]*\)(?:;|\n\{)", code))
    constants = set(re.findall(r"^(?:#define |    )(KVT_[A-Z0-9_]+)\b", code, re.M))

    def linked(text):
        """Doxygen makes links of name() and #NAME."""
        text = re.sub(r"\bkvt_\w+\b(?!\()", lambda m: m[0] + "()" * (m[0] in functions), text)
        return re.sub(r"(?<!#)\bKVT_\w+\b", lambda m: "#" * (m[0] in constants) + m[0], text)

    def documented(comment, opening):
        return opening + linked(marked_up(comment[2:-2])) + "*/"

    for match in COMMENT.finditer(source):
        before = source[source.rfind("\n", 0, match.start()) + 1:match.start()]
        behind = source[match.end():]
        comment = match[0]
        if "\n/* ----" in "\n" + comment:
            pass
        elif before.strip():
            comment = documented(comment, "/**< ")
        elif not out and file != "kvtile.h":
            comment = f"/** @file {file}{linked(comment[2:-2])}*/"
        elif not out:
            comment = ("/** @file kvtile.h @brief The public header; the main page is about it. */ "
                       f"/** @mainpage{linked(comment[2:-2])}*/")
        elif re.match(r"\n#if.*\n#define (\w+)", behind):
            name = re.match(r"\n#if.*\n#define (\w+)", behind)[1]
            comment = documented(comment, f"/** @def {name}\n")
        elif re.match(r"\n *[^\s]", behind):
            first = behind.lstrip("\n").split("\n")[0]
            if not (first.startswith("#define") and "/*" in first):  # which has its own
                comment = documented(comment, "/** ")
        out += [source[end:match.start()], comment]
        end = match.end()
    return "".join(out) + source[end:]


def shared(source):
    """Declarations directly behind one with a comment get the same documentation."""
    out, last, inside, above = [], None, False, False
    for line in source.split("\n"):
        define = re.match(r"#define (\w+)", line)
        if inside:  # a declaration of several lines
            inside = not line.rstrip().endswith(";")
        elif line.startswith("KVT_API") or define:
            name = define[1] if define else re.search(r"(kvt_\w+)\(", line)[1]
            if "/**" in line:
                last = None
            elif above:
                last = name
            elif last:
                out.append(f"/** @copydoc {last} */")
            inside = not define and not line.rstrip().endswith(";")
        elif not (line.strip().endswith("*/") and last and "/**" not in line):
            last = None
        above = line.rstrip().endswith("*/") and not define
        out.append(line)
    return "\n".join(out)


def fields(source):
    """Structs' fields, one to a line, that have no comment of their own."""

    def of_struct(match):
        says, out, above = match[1] or "", [], False
        other = re.search(r"fields as in (\w+)", says)
        for line in match[2].split("\n"):
            found = re.match(r"( +)((?:const )?\w+ \**)(\w+(?:\[.*?\])*(?:, \w+(?:\[.*?\])*)*);$", line)
            pointer = re.match(r"( +)(\w+ \**)\(\*(\w+)\)\(.*\);$", line)
            if above or not (found or pointer):
                out.append(line)
            elif pointer:
                if re.search(rf"\b{pointer[3]}\b", says):
                    line += " /**< See the description of the struct. */"
                out.append(line)
            else:
                for declared in found[3].split(", "):
                    name = re.match(r"\w+", declared)[0]
                    text = ""
                    if name.endswith("_"):
                        text = " /**< The library's. */"
                    elif other:
                        text = f" /**< As in {other[1]}. */"
                    elif re.search(rf"\b{name}\b", says):
                        text = " /**< See the description of the struct. */"
                    out.append(f"{found[1]}{found[2]}{declared};{text}")
            above = line.rstrip().endswith("*/") and "/**<" not in line
        return match[0].replace(match[2], "\n".join(out))

    return re.sub(r"(/\*\*(?:(?!\*/).)*\*/\n)?typedef struct \w+ \{\n(.*?)\n\} \w+;", of_struct, source,
                  flags=re.S)


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as header:
        sys.stdout.write(fields(shared(comments(header.read(), os.path.basename(sys.argv[1])))))
