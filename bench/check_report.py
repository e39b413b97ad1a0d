#!/usr/bin/env python3
"""Check kvt-bench report.

  check_report.py page BENCH FOLDER [MODEL TOKENIZER]   make a page and check it; 77 without gnuplot
  check_report.py screen FOLDER                         look at it in Chromium; 77 without Chromium

The second one takes the first one's page, and leaves screenshots in FOLDER.
"""
import html
import html.parser
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
import zlib

VOID = {"meta", "br", "hr", "img", "link", "input", "source", "wbr", "col", "area", "base", "embed"}
SECTIONS = {  # id: charts that it has at least
    "decode-context": 1, "decode-heads": 1, "fidelity": 1, "prefill": 1, "append": 1, "snapshot": 1,
    "snapshot-bars": 0, "machine": 0, "how": 0}
failures = 0


def check(condition, text):
    global failures
    if not condition:
        failures += 1
        print("FAILED:", text)


class Page(html.parser.HTMLParser):
    """Every element is closed in order; ids, references and texts by section are kept."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.stack, self.ids, self.references, self.tags = [], [], [], []
        self.sections, self.section, self.errors, self.text = {}, None, [], []
        self.feed(text)
        self.close()
        if self.stack:
            self.errors.append("not closed: %s" % self.stack)

    def start(self, tag, attributes):
        names = [name for name, _ in attributes]
        if len(names) != len(set(names)):
            self.errors.append("an attribute twice in <%s>" % tag)
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "xlink:href", "src", "srcset", "data", "action", "poster"):
                self.references.append((tag, name, value))
            if name.startswith("on"):
                self.errors.append("a handler in <%s>" % tag)
            for target in re.findall(r"url\(([^)]*)\)", value or ""):
                self.references.append((tag, name, target))
        if tag == "section":
            self.section = dict(attributes).get("id")
            self.sections[self.section] = {"svg": 0, "rows": 0, "text": ""}
        if self.section and tag in ("svg", "tr"):
            self.sections[self.section]["svg" if tag == "svg" else "rows"] += 1

    def handle_starttag(self, tag, attributes):
        self.start(tag, attributes)
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.start(tag, attributes)

    def handle_endtag(self, tag):
        if not self.stack or self.stack.pop() != tag:
            self.errors.append("</%s> at line %d closes nothing" % (tag, self.getpos()[0]))
        if tag == "section":
            self.section = None

    def handle_data(self, data):
        self.text.append(data)
        if self.section:
            self.sections[self.section]["text"] += data + "\n"


def run(*arguments, code=0, **more):
    done = subprocess.run(arguments, capture_output=True, text=True, errors="replace",
                          timeout=600, check=False, **more)
    check(done.returncode == code,
          "%s: exit code %d, not %d: %s" % (ascii(" ".join(arguments)), done.returncode, code, done.stderr))
    return done


def read(path):
    with open(path, encoding="utf-8") as f:
        return f.read()


def write(path, text):
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)


def digits(x):
    """As bench_tables.c prints numbers of a hundredth and more."""
    size = abs(x)
    return "%.*f" % (0 if size >= 100 else 1 if size >= 10 else 2 if size >= 0.1 else 3, x)


def check_page(path):
    text = read(path)
    page = Page(text)
    check(not page.errors, "%s: not well-formed: %s" % (path, page.errors[:5]))
    check(len(page.ids) == len(set(page.ids)), "%s: an id twice" % path)
    for tag, name, target in page.references:
        check(target.startswith("#") and target[1:] in page.ids,
              "%s: <%s %s=%s> leads out of the page or nowhere" % (path, tag, name, target))
    check(not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags),
          path + ": an element that loads or runs something")
    rest = re.sub(r'xmlns(:xlink)?="http://www\.w3\.org/[0-9a-z/]+"', "", text)
    check("://" not in rest and "@import" not in rest, path + ": an external address")
    fixed = re.findall(r"(?:fill|stroke|color) *= *[\"'](?:black|white|#|rgb)[^\"']*", text)
    check(not fixed, "%s: colours that a dark page does not change: %s" % (path, fixed[:5]))
    check(set(SECTIONS) <= set(page.sections), "%s: sections %s" % (path, list(page.sections)))
    return text, page


def check_figures(page, lines):
    """The tables have the figures of the data."""
    keys = {"prefill": ("prefill", ["gflops", "ratio"]),
            "append": ("append", ["us_per_token", "memcpy_ratio"]),
            "snapshot": ("snapshot", ["gbps", "plain_ratio"]),
            "snapshot-bars": ("snapshot_bars", ["value"]),
            "machine": ("machine", ["read_gbps", "fma_gflops"])}
    n = 0
    for section, (bench, figures) in keys.items():
        cells = page.sections[section]["text"].split("\n")
        for line in lines:
            for key in figures if line["bench"] == bench else []:
                if abs(line[key]) >= 0.01:
                    n += 1
                    check(digits(line[key]) in cells,
                          "%s: %s %s is not in the table" % (section, key, line[key]))
    for line in lines:
        if line["bench"] == "decode" and line["gbps"] >= 0.01 and line["ratio"] >= 0.01:
            n += 1
            check("%s, %s" % (digits(line["gbps"]), digits(line["ratio"])) in
                  (page.sections["decode-context"]["text"] +
                   page.sections["decode-heads"]["text"]).split("\n"),
                  "decode: %s GB/s is not in the tables" % line["gbps"])
    check(n > 40, "only %d figures compared" % n)


def check_made(bench, folder, model):
    out = os.path.join(folder, "page")
    run(bench, "report", "--quick", "--out", out, *model)
    text, page = check_page(os.path.join(out, "report.html"))
    lines = [json.loads(line) for line in read(os.path.join(out, "data.jsonl")).splitlines()]
    setup = lines[0]
    machine = "".join(page.text)
    for key in ("cpu", "compiler", "commit", "version", "date", "system"):
        check(setup[key] in machine.split("How it was measured")[0],
              "%s (%s) is not in the page's head" % (key, setup[key]))
    check("no figure here means anything" in machine, "no warning that the data are of --quick")
    for name, charts in SECTIONS.items():
        section = page.sections.get(name, {"svg": 0, "rows": 0, "text": ""})
        if name == "fidelity" and not model:
            charts = 0
        check(section["svg"] >= charts, "%s: %d charts" % (name, section["svg"]))
        check(section["rows"] > 1 or name == "how", "%s: no table" % name)
    how = page.sections["how"]["text"]
    commands = [line["command"] for line in lines if line.get("kind") == "command"]
    check(len(commands) >= 7, "commands: %s" % commands)
    for command in commands + [setup["command"]]:
        check(command in how, "the command %s is not in the page" % command)
    check(json.dumps(lines[-1]["bench"]) in how and lines[-1]["cpu"] in how, "no raw data in the page")
    check_figures(page, lines)

    charts = sorted(name for name in os.listdir(out) if name.endswith(".svg"))
    check(len(charts) == page.tags.count("svg"), "%s, %d in the page" % (charts, page.tags.count("svg")))
    for name in charts:
        try:
            root = ElementTree.parse(os.path.join(out, name)).getroot()
        except ElementTree.ParseError as error:
            check(False, "%s: %s" % (name, error))
            continue
        tags = [element.tag.split("}")[-1] for element in root.iter()]
        check(root.tag.endswith("}svg") and tags.count("path") > 8 and tags.count("text") > 5,
              name + ": hardly anything in it")

    again = os.path.join(folder, "again")  # the data alone make the same page
    run(bench, "report", "--from", os.path.join(out, "data.jsonl"), "--out", again)
    check(read(os.path.join(again, "report.html")) == text, "--from makes another page")
    return os.path.join(out, "data.jsonl"), lines


def check_other_data(bench, folder, lines):
    """Data of single commands, without a model, with names that would do harm."""
    path, out = os.path.join(folder, "other.jsonl"), os.path.join(folder, "other")
    trap = os.path.join(folder, "trap")
    done = run(bench, "fidelity", "--quick", "--json", "--heads", "4:2", "--dim", "64", "--ctx", "256")
    harm = dict([line for line in lines if line["bench"] == "decode"][0])
    harm["cpu"] = "</title><script>alert(1)</script><img src=//x>"
    harm["k_type"] = '"; system("touch %s"); print "' % trap
    harm["v_type"] = "`touch %s`$(touch %s)'\n" % (trap, trap)
    harm["mode"] = '%s%n"<b>|'
    write(path, json.dumps(harm) + "\n" + done.stdout)
    run(bench, "report", "--from", path, "--out", out)
    _, page = check_page(os.path.join(out, "report.html"))
    check(not os.path.exists(trap), "a name in the data was run as a command")
    check("b" not in page.tags and harm["cpu"] in "".join(page.text), "a name became markup")
    check("No model was measured" in page.sections["fidelity"]["text"], "no word on the missing model")
    check(page.sections["fidelity"]["rows"] > 4, "no table of random tokens")
    check("Not in these data" in page.sections["append"]["text"], "no word on missing lines")


def check_markdown(bench, folder, data, lines):
    path, out = os.path.join(folder, "doc.md"), os.path.join(folder, "markdown")
    doc = "# `<!-- report x -->`\n\n<!-- report append -->\nold\n<!-- end append -->\n\nkept\n" \
          "<!-- report setup -->\n<!-- end setup -->\nlast\n"
    arguments = [bench, "report", "--out", out, "--markdown", path, "--from"]
    write(path, doc)
    run(*arguments, data, code=2)  # of --quick
    check(read(path) == doc, "a refused --markdown changed the file")
    noisy = os.path.join(folder, "noisy.jsonl")
    calm = os.path.join(folder, "calm.jsonl")
    for name, spread in ((noisy, 0.2), (calm, 0.02)):
        rows = [dict(line, quick=False) for line in lines]
        for row in rows:
            if row.get("ms_median"):
                row["ms_p10"] = row["ms_median"] * (1 - spread / 2)
                row["ms_p90"] = row["ms_median"] * (1 + spread / 2)
        write(name, "".join(json.dumps(row) + "\n" for row in rows))
    check("busy" in run(*arguments, noisy, code=2).stderr, "noisy data are not called so")
    check(read(path) == doc, "a refused --markdown changed the file")
    check("machine was busy" in read(os.path.join(out, "report.html")), "no warning in a noisy page")
    run(*arguments, calm)
    made = read(path)
    check("machine was busy" not in read(os.path.join(out, "report.html")), "a warning in a calm page")
    check(re.fullmatch(r"# `<!-- report x -->`\n\n<!-- report append -->\n(\|.*\|\n){13,}<!-- end append -->\n\nkept\n"
                       r"<!-- report setup -->\n(.*\n)+<!-- end setup -->\nlast\n", made),
          "the tables in the document: " + made)
    check(lines[0]["cpu"] in made and "kvt-bench append" in made, "no machine or command in it")
    widths = {row.count("|") for row in made.split("\n") if row.startswith("|")}
    check(len(widths) == 1, "rows of a table differ in their columns: %s" % widths)
    run(*arguments, calm)
    check(read(path) == made, "the second time differs")
    run(*arguments, data, "--force")
    # Through a link, with a file of the temporary's name: the link, that file and the mode stay.
    link, part = os.path.join(folder, "link.md"), path + ".part"
    write(path, doc)
    write(part, "of the user\n")
    os.chmod(path, 0o640)
    os.symlink("doc.md", link)
    run(*(link if x == path else x for x in arguments), calm)
    check(read(path) == made and os.path.islink(link) and os.stat(path).st_mode & 0o777 == 0o640 and
          read(part) == "of the user\n" and not os.path.exists(part + "-2"), "--markdown through a link")
    ours = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "docs", "performance.md")
    before = read(ours)
    write(path, before)
    run(*arguments, calm)
    block = r"<!-- report (\S+) -->\n((?:.*\n)*?)<!-- end \1 -->\n"
    check(re.sub(block, "", read(path)) == re.sub(block, "", before), "text beside the tables changed")
    tables = re.findall(block, read(path))
    check(len(tables) == len(re.findall(block, before)) > 5 and
          all("|--:|" in text for name, text in tables if name != "setup"),
          "the tables of docs/performance.md: %s" % [name for name, _ in tables])
    for bad, reason in (("<!-- report nothing -->\n<!-- end nothing -->\n", "no table nothing"),
                        ("a\n<!-- report append -->\n", "doc.md:2: no <!-- end append -->"),
                        ("<!-- report append --> x\n<!-- end append -->\n", "doc.md:1: not of"),
                        ("no mark\n", "no <!-- report")):
        write(path, bad)
        error = run(*arguments, calm, code=2).stderr
        check(reason in error and read(path) == bad, "%r: %s" % (bad, error))


def check_failed(bench, folder, on_model):
    """A measurement that fails has its lines beside the data that were there; texts are UTF-8."""
    out = os.path.join(folder, "failed")
    os.makedirs(out)
    for name in ("data.jsonl", "data.jsonl.part"):
        write(os.path.join(out, name), "of another one\n")
    done = run(bench, "report", "--quick", "--out", out, "--model", "/nowhere/\udcff\u00e4", "--tokenizer",
               "/nowhere", code=1 if on_model else 2)
    check("this command ended" in done.stderr and "data.jsonl.part-2" in done.stderr,
          "a failed command: " + done.stderr)
    for name in ("data.jsonl", "data.jsonl.part"):
        check(read(os.path.join(out, name)) == "of another one\n", name + " was there, and is not")
    kept = read(os.path.join(out, "data.jsonl.part-2"))
    check('"bench": "decode"' in kept, "lines before a failed command are lost")
    check("/nowhere/\\ufffd\u00e4" in kept, "a name that is no UTF-8")


def main_page(bench, folder, *model):
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    empty = os.path.join(folder, "empty")
    os.makedirs(empty)
    done = run(bench, "report", "--quick", "--out", os.path.join(folder, "none"), code=1,
               env={"PATH": empty})
    check("gnuplot-nox" in done.stderr and not os.path.exists(os.path.join(folder, "none")),
          "without gnuplot: " + done.stderr)
    if not shutil.which("gnuplot"):
        print("no gnuplot here")
        return 77
    options = ["--model", model[0], "--tokenizer", model[1]] if model else []
    data, lines = check_made(bench, folder, options)
    check_other_data(bench, folder, lines)
    check_markdown(bench, folder, data, lines)
    check_failed(bench, folder, bool(model))
    return 0


# ---- Chromium ----


def png_rows(path):
    """Width, height and rows of an 8-bit RGB or RGBA picture without interlacing."""
    with open(path, "rb") as f:
        data = f.read()
    width, height, depth, kind, _, _, interlace = struct.unpack(">IIBBBBB", data[16:29])
    check(data[:8] == b"\x89PNG\r\n\x1a\n" and depth == 8 and kind in (2, 6) and not interlace,
          path + ": not such a PNG")
    at, packed = 8, b""
    while at < len(data):
        n, name = struct.unpack(">I4s", data[at:at + 8])
        packed += data[at + 8:at + 8 + n] if name == b"IDAT" else b""
        at += 12 + n
    raw, step = zlib.decompress(packed), (3 if kind == 2 else 4) * width + 1
    return width, height, [raw[i * step + 1:(i + 1) * step] for i in range(height)]


def chromium(program, profile, *arguments):
    done = subprocess.run(
        [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         "--no-first-run", "--disable-extensions", "--disable-dev-shm-usage", "--user-data-dir=" + profile, *arguments],
        capture_output=True, text=True, timeout=120, check=False)
    return done.stdout


def main_screen(folder):
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                   None)
    page = os.path.join(folder, "page", "report.html")
    if not program or not os.path.exists(page):
        print("no Chromium here" if not program else "no page: it needs gnuplot")
        return 77
    profile = os.path.join(folder, "chromium")
    probe = os.path.join(folder, "probe.html")
    write(probe, "<!DOCTYPE html><title>-</title><script>document.title=6*7</script>")
    if "<title>42</title>" not in chromium(program, profile, "--dump-dom",
                                           "file://" + os.path.abspath(probe)):
        print(program, "does not run here, or not on files of this folder")
        return 77
    for name, width, flags in (("desktop", 1280, ()), ("phone", 375, ()),
                               ("phone-dark", 375, ("--blink-settings=preferredColorScheme=0",))):
        # A frame is as narrow as asked for; windows have a least width.
        frame = os.path.join(folder, "frame-%s.html" % name)
        write(frame, '<!DOCTYPE html><title>-</title><body style="margin:0"><iframe id="f" '
                     'style="border:0;width:%dpx;height:%%HEIGHT%%px" srcdoc="%s"></iframe><script>'
                     'f.onload=()=>{let d=f.contentDocument.documentElement,w=d.clientWidth;'
                     'document.title="at "+[f.contentWindow.innerWidth,w,d.scrollWidth,'
                     'd.scrollHeight,d.querySelectorAll("svg").length,'
                     '[...d.querySelectorAll("svg,p,h1,h2,pre,.scroll")].filter(e=>'
                     'e.getBoundingClientRect().right>w+.5).length].join(" ")}</script>'
              % (width, html.escape(read(page))))
        found = None
        for _ in range(2):  # the second time as high as the page is
            text = read(frame).replace("%HEIGHT%", found[4] if found else "900")
            write(frame, text) if found else write(frame + ".first.html", text)
            dom = chromium(program, profile, "--dump-dom", *flags,
                           "file://" + os.path.abspath(frame if found else frame + ".first.html"))
            found = re.search(r"<title>at (\d+) (\d+) (\d+) (\d+) (\d+) (\d+)</title>", dom)
            if not found:
                check(False, "%s: Chromium says nothing about the page" % name)
                break
        os.remove(frame + ".first.html")
        if not found:
            continue
        inner, client, scroll, height, charts, beyond = map(int, found.groups())
        print("%s: %d wide, content %d of %d, %d high, %d charts" % (name, inner, scroll, client,
                                                                     height, charts))
        check(inner == width, "%s: %d wide" % (name, inner))
        check(scroll <= client and beyond == 0,
              "%s: %d wide in %d, %d elements beyond" % (name, scroll, client, beyond))
        check(charts >= 7, "%s: %d charts" % (name, charts))
        picture = os.path.join(folder, name + ".png")
        if os.path.exists(picture):
            os.remove(picture)
        chromium(program, profile, *flags, "--window-size=%d,%d" % (width, height),
                 "--screenshot=" + picture, "file://" + os.path.abspath(frame))
        if not os.path.exists(picture):
            check(False, name + ": no screenshot")
            continue
        wide, high, rows = png_rows(picture)
        check(wide == width and high == height, "%s: a picture of %d x %d" % (name, wide, high))
        inked = sum(len(set(row)) > 8 for row in rows)
        check(inked > 0.3 * high, "%s: %d of %d rows have something in them" % (name, inked, high))
    shutil.rmtree(profile, ignore_errors=True)
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in ("page", "screen"):
        sys.exit(__doc__)
    result = (main_page if sys.argv[1] == "page" else main_screen)(*sys.argv[2:])
    if failures:
        print("%d failures" % failures)
    sys.exit(1 if failures else result)
