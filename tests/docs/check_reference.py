#!/usr/bin/env python3
"""The reference of the public headers: Doxygen makes it without a warning, and it documents all.

    check_reference.py DOXYGEN SOURCE OUTPUT
    check_reference.py --self-test DOXYGEN SOURCE OUTPUT

SOURCE is the repository; its docs/reference/Doxyfile writes to OUTPUT here. Every function, type,
field, enum value and macro of the headers, found in their text, has to be in Doxygen's XML with a
description. The self-test takes comments out of a copy of the headers and expects each to be missed.
"""
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path


def declared(header):
    """Names that the header declares, by its text without comments."""
    text = re.sub(r"/\*.*?\*/", "", header, flags=re.S)
    names = set(re.findall(r"^#define (KVT_\w+)", text, re.M))
    names |= set(re.findall(r"^(?:KVT_API|static inline) [^;{]*?\b(kvt_\w+)\(", text, re.M))
    names |= set(re.findall(r"^\} (kvt_\w+);", text, re.M))
    names |= set(re.findall(r"^typedef struct (kvt_\w+) \1;", text, re.M))
    for body in re.findall(r"typedef enum \w+ \{(.*?)\}", text, re.S):
        names |= set(re.findall(r"\bKVT_\w+", body))
    for name, body in re.findall(r"typedef struct (\w+) \{\n(.*?)\n\}", text, re.S):
        for line in body.split(";"):
            pointer = re.search(r"\(\*(\w+)\)", line)
            fields = [pointer[1]] if pointer else re.findall(r"(\w+)(?:\[.*?\])?\s*(?:,|$)", line.strip())
            names |= {f"{name}.{field}" for field in fields}
    return names


def described(element):
    return any("".join(part.itertext()).strip() for part in
               (element.find("briefdescription"), element.find("detaileddescription")) if part is not None)


def documented(folder):
    """Names in the XML that have a description."""
    names = set()
    for file in Path(folder).glob("*.xml"):
        for compound in xml.parse(file).getroot().findall("compounddef"):
            struct = compound.findtext("compoundname") if compound.get("kind") == "struct" else ""
            if struct and described(compound):
                names.add(struct)
            for member in compound.iter("memberdef"):
                name = member.findtext("name")
                if described(member):
                    names.add(f"{struct}.{name}" if struct else name)
                names |= {value.findtext("name") for value in member.findall("enumvalue") if described(value)}
    return names


def headers(source):
    return sorted((Path(source) / "include/kvtile").glob("*.h"))


def check(doxygen, source, output, report=print):
    """Faults, as a list of lines."""
    shutil.rmtree(output, ignore_errors=True)
    Path(output).mkdir(parents=True)
    settings = (Path(source) / "docs/reference/Doxyfile").read_text(encoding="utf-8")
    settings += f'\nOUTPUT_DIRECTORY = "{output}"\nINPUT_FILTER = "{sys.executable} docs/reference/filter.py"\n'
    done = subprocess.run([doxygen, "-"], input=settings, cwd=source, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, encoding="utf-8")
    faults = [line for line in done.stdout.split("\n") if line.strip()]
    if done.returncode != 0 and not faults:
        faults.append(f"doxygen: {done.returncode}")
    names = set()
    for header in headers(source):
        more = declared(header.read_text(encoding="utf-8"))
        if not more:
            faults.append(f"{header} declares nothing")
        names |= more
    missing = sorted(names - documented(Path(output) / "xml"))
    faults += [f"not documented: {name}" for name in missing]
    report(f"{len(names)} names, {len(missing)} of them not documented, {len(faults) - len(missing)} lines of doxygen")
    return faults


# What is taken out of a header, and the name that has to be missed.
TAKEN = [
    (r"/\*\n \* Create a cache\..*?\*/\n", "kvt_cache_create"),
    (r" /\* the allocator returned NULL \*/", "KVT_ERR_MEMORY"),
    (r" +/\* of a cache \*/", "KVT_MAX_THREADS"),
    (r"/\* What a call answers\. \*/\n", "kvt_status"),
    (r" +/\* the model's number of it \*/", "kvt_attend_args.layer"),
    (r"/\* A sequence of a cache.*?\*/\n", "kvt_seq"),
    (r"/\*\n \* Two stores as one:.*?\*/\n", "kvt_store_open_tiers"),
    (r" +/\* Each value in turn.*?\*/\n", "kvt_store.list"),
]


def self_test(doxygen, source, output):
    copy, wrong = Path(output) / "source", 0
    texts = {header.name: header.read_text(encoding="utf-8") for header in headers(source)}
    for pattern, name in TAKEN:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(Path(source) / "docs/reference", copy / "docs/reference")
        (copy / "include/kvtile").mkdir(parents=True)
        count = 0
        for header, text in texts.items():
            less, n = re.subn(pattern, "", text, flags=re.S)
            (copy / "include/kvtile" / header).write_text(less, encoding="utf-8")
            count += n
        faults = check(doxygen, copy, Path(output) / "out", lambda line: None)
        good = count == 1 and f"not documented: {name}" in faults
        print(f"without the comment of {name}: {'missed' if good else faults or 'not missed'}")
        wrong += not good
    return wrong


def main():
    if not shutil.which(sys.argv[-3]):
        print("skipped: no doxygen")
        return 77
    if sys.argv[1] == "--self-test":
        return 1 if self_test(*sys.argv[2:5]) else 0
    faults = check(*sys.argv[1:4])
    print("\n".join(faults))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
