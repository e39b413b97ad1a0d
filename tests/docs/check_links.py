#!/usr/bin/env python3
"""Check that relative links and anchors of Markdown pages lead somewhere; without a network.

    check_links.py ROOT PAGE...

A target has to exist within ROOT, and an #anchor has to be a heading of the page (by GitHub's rule
for their names) or an id in its HTML. Targets with a scheme (https:, mailto:) are not looked at.
"""
import os
import re
import sys
from pathlib import Path
from urllib.parse import unquote

INLINE = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
REFERENCE = re.compile(r"^ {0,3}\[[^\]]+\]:\s*<?(\S+?)>?(?:\s|$)")
ATTRIBUTE = re.compile(r"\b(?:href|src|srcset)=[\"']([^\"'\s]+)")


def lines_of(path):
    """(number, line) outside fenced blocks."""
    fence = None
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            mark = re.match(r" {0,3}(`{3,}|~{3,})", line)
            if fence:
                if mark and mark[1].startswith(fence) and not line.strip(" `~\n"):
                    fence = None
            elif mark:
                fence = mark[1]
            else:
                yield number, line.rstrip("\n")


def anchors_of(path):
    found, counts = set(), {}
    for _, line in lines_of(path):
        found.update(re.findall(r"\b(?:id|name)=[\"']([^\"']+)", line))
        heading = re.match(r" {0,3}#{1,6}\s+(.*?)\s*#*\s*$", line)
        if heading:
            text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading[1])  # a link's text
            text = re.sub(r"<[^>]*>", "", text)
            name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            count = counts.get(name, 0)
            counts[name] = count + 1
            found.add(f"{name}-{count}" if count else name)
    return found


def links_of(path):
    for number, line in lines_of(path):
        text = re.sub(r"(`+).*?\1", lambda code: " " * len(code[0]), line)
        for pattern in (INLINE, REFERENCE, ATTRIBUTE):
            for link in pattern.finditer(text):
                yield number, link[1]


def fault(root, page, target):
    """What is wrong with a link, or None."""
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:|//", target):
        return None
    name, _, anchor = unquote(target).partition("#")
    if name.startswith("/"):
        return "an absolute path"
    file = (page.parent / name).resolve() if name else page
    if not file.is_relative_to(root):
        return "leads out of the repository"
    if not file.exists():
        return "does not exist"
    if anchor:
        if file.is_dir():
            file = file / "README.md"
        if file.suffix != ".md":
            return "an anchor in what is no page"
        if anchor not in anchors_of(file):
            return f"has no such heading; it has {', '.join(sorted(anchors_of(file)))}"
    return None


def main():
    root = Path(sys.argv[1]).resolve()
    checked, faults = 0, []
    for page in sys.argv[2:]:
        for number, target in links_of(page):
            checked += 1
            found = fault(root, Path(page).resolve(), target)
            if found:
                faults.append(f"{os.path.relpath(page, root)}:{number}: {target}: {found}")
    print("\n".join(faults + [f"{checked} links of {len(sys.argv) - 2} pages, {len(faults)} lead nowhere"]))
    return 1 if faults or not checked else 0


if __name__ == "__main__":
    sys.exit(main())
