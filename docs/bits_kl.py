#!/usr/bin/env python3
"""Draw bits_kl.svg, the README's picture, from the table in fidelity.md ("What was found").

    python3 docs/bits_kl.py [--check]

--check: exit with 1 where the drawing, or the table of guide/types.md, is not what that table gives.
"""
import math
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 76, 24, 62, 56
BITS, KL = (3.7, 9.2), (0.02, 100)  # of the axes
# Where a label stands: (side, text, pixels down). Points without one are named by their neighbour's.
LABELS = {
    "i8/i8": ("left", "i8/i8", 9), "i8/i5": ("left", "i8/i5", 9), "i8/i4": ("left", "i8/i4", 9),
    "i4/i8": ("right", "i4/i8", 0), "i4/i5": ("right", "i4/i5", -7), "i4/i4": ("left", "i4/i4", 7),
    "q8_0": ("right", "q8_0", 0), "turboquant4": ("left", "turboquant4", -5),
    "kvarn4": ("right", "q4_0 rotated, kvarn4", 0), "kivi4": ("right", "exl3-4, kivi4", 0),
    "lm4-rot": ("left", "lm4 rotated", 0), "q4_0": ("right", "q4_0", -4),
}


def table():
    """name: (bits, KL) of the first table of "What was found"."""
    text = (HERE / "fidelity.md").read_text(encoding="utf-8").split("## What was found")[1]
    rows = {}
    for name, bits, kl in re.findall(r"^\| ([\w/-]+) \| ([\d.]+) \| ([\d.]+)(?: \+- [\d.]+)? \|[^|]*\|$",
                                     text.split("\n\n| |")[0], re.M):
        rows.setdefault(name, (float(bits), float(kl)))
    return rows


def x_of(bits):
    return LEFT + (bits - BITS[0]) / (BITS[1] - BITS[0]) * (WIDTH - LEFT - RIGHT)


def y_of(kl):
    part = (math.log10(kl) - math.log10(KL[0])) / (math.log10(KL[1]) - math.log10(KL[0]))
    return HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM)


def draw(rows):
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
           'font-family="system-ui, sans-serif" font-size="14">',
           "<title>Loss of quality against bits an element of K and V</title>",
           "<style>",
           ".card{fill:#fff;stroke:#d0d7de}.grid{stroke:#e4e8ec}.axis,.other{fill:#57606a}.title{fill:#1f2328}",
           ".ours{fill:#0b62c4}.line{stroke:#0b62c4}",
           "@media (prefers-color-scheme:dark){.card{fill:#0d1117;stroke:#30363d}.grid{stroke:#21262d}",
           ".axis,.other{fill:#9da7b1}.title{fill:#e6edf3}.ours{fill:#58a6ff}.line{stroke:#58a6ff}}",
           "</style>",
           f'<rect class="card" x=".5" y=".5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8"/>',
           f'<text class="title" x="{LEFT - 56}" y="28" font-size="16">KL of the next token, 1e-4 nats, against '
           "the bits of an element of K and V</text>",
           f'<text class="axis" x="{LEFT - 56}" y="47">lower and further left is better</text>']
    for tick in (0.1, 1, 10, 100):
        y = y_of(tick)
        out += [f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>',
                f'<text class="axis" x="{LEFT - 8}" y="{y + 5:.1f}" text-anchor="end">{tick:g}</text>']
    for tick in range(4, 10):
        x = x_of(tick)
        out += [f'<path class="grid" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>',
                f'<text class="axis" x="{x:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{tick}</text>']
    out.append(f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 14}" text-anchor="middle">'
               "bits, scales and a window of f16 included, at 2048 tokens (f16: 16)</text>")
    ours = [name for name in rows if "/" in name]
    line = sorted((rows[name] for name in ours if name != "i4/i8"), reverse=True)
    out.append('<path class="line" fill="none" stroke-width="2" d="M' +
               "L".join(f"{x_of(bits):.1f} {y_of(kl):.1f}" for bits, kl in line) + '"/>')
    for name, (bits, kl) in rows.items():
        kind, x, y = "ours" if name in ours else "other", x_of(bits), y_of(kl)
        out.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{5 if kind == "ours" else 4}"/>')
        if name in LABELS:
            side, text, down = LABELS[name]
            out.append(f'<text class="{kind}" x="{x + (10 if side == "right" else -10):.1f}" y="{y + 5 + down:.1f}"'
                       + (' text-anchor="end"' if side == "left" else "")
                       + (' font-weight="600"' if kind == "ours" else "") + f">{text}</text>")
    out += [f'<text class="ours" x="{WIDTH - RIGHT - 8}" y="{TOP + 18}" text-anchor="end" font-weight="600">'
            "kvtile, K/V</text>",
            f'<text class="other" x="{WIDTH - RIGHT - 8}" y="{TOP + 38}" text-anchor="end">'
            "formats of others, with the same window</text>", "</svg>"]
    return "\n".join(out) + "\n"


def differing(rows):
    """Rows of guide/types.md's table that are not fidelity.md's."""
    text = (HERE / "guide/types.md").read_text(encoding="utf-8").split("## What they cost")[1]
    found = re.findall(r"^\| \*?([\w/, -]+?)\*? \| ([\d.]+) \| ([\d.]+) \|$", text, re.M)
    same = [(name, bits, kl) for name, bits, kl in found
            if rows.get(name.replace(", rotated", "-rot")) == (float(bits), float(kl))]
    return [row for row in found if row not in same] if same else ["there is no such table"]


def main():
    rows = table()
    missing = [name for name in LABELS if name not in rows]
    if missing:
        sys.exit(f"fidelity.md's table lacks {', '.join(missing)}")
    picture = HERE / "bits_kl.svg"
    if "--check" in sys.argv:
        if picture.read_text(encoding="utf-8") != draw(rows):
            sys.exit("docs/bits_kl.svg is not what fidelity.md's table gives: python3 docs/bits_kl.py")
        if differing(rows):
            sys.exit(f"docs/guide/types.md is not as fidelity.md: {differing(rows)}")
        return
    picture.write_text(draw(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
