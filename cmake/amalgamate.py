#!/usr/bin/env python3
"""Make one kvtile.c of the library's sources, for a program that takes in files, not a library.

amalgamate.py SOURCE FOLDER writes kvtile.c, the four public headers and LICENSE into FOLDER.

The internal headers come first, each once, then the files. Macros of a file are undefined at its
end. Where files define the same static name or type, the later one's gets the file's name as a
prefix; a name that macros paste (pv_##rows) is renamed by its beginning. Instruction sets are
guarded by what the compiler defines where its flags allow them.
"""
import pathlib
import re
import sys

# Of an instruction set: its folder, what its files begin with, and what the compiler defines where
# the whole program may use it. In the order of simd/kernels.h. AVX-VNNI and AMX are left out:
# the former shares a header of functions (avx2_4bit.h) that differ in what they call.
ISAS = [
    ("AVX2", "x86", "avx2", ["__x86_64__", "__AVX2__", "__FMA__", "__F16C__"]),
    ("AVX512VNNI", "x86", "avx512", ["KVT_HAVE_AVX2", "__AVX512F__", "__AVX512BW__",
                                     "__AVX512DQ__", "__AVX512VL__", "__AVX512VNNI__"]),
    ("NEON", "arm", "neon", ["__aarch64__", "__ARM_NEON"]),
    ("DOTPROD", "arm", "dotprod", ["KVT_HAVE_NEON", "__ARM_FEATURE_DOTPROD"]),
    ("I8MM", "arm", "i8mm", ["KVT_HAVE_DOTPROD", "__ARM_FEATURE_MATMUL_INT8"]),
]

# dotprod.c and i8mm.c make their kernels by the macros of neon_i8.h and neon_4bit.h, which paste
# the same names in each: these get their prefix by macros around the file.
TEMPLATES = {"dotprod", "i8mm"}
PASTED = [f"{name}_{rows}" for rows in range(1, 9) for name in (
    "qk_near", "pv_near", "qk_fast", "pv_fast", "qk_i4", "pv_i4", "pv_i5")]
PASTED += ["product_near", "product_fast", "store_near", "store_fast"]

HEAD = """\
/*
 * kvtile %s in one file, with kvtile.h and store.h beside it. Made by cmake/amalgamate.py: change the
 * library's sources, not this. Licence: MIT, see LICENSE.
 *
 *   cc -O2 -std=c11 kvtile.c app.c -lsleef -lzstd -lxxhash -lm -lpthread
 *
 * It has the scalar kernels and those of the instruction sets that the compiler's flags enable: on
 * x86-64 AVX2 (-mavx2 -mfma -mf16c) and AVX-512 VNNI (these and -mavx512f -mavx512bw -mavx512dq
 * -mavx512vl -mavx512vnni), or what this machine has (-march=native); on ARM64 NEON, dotprod and
 * i8mm (-march=armv8.2-a+dotprod+i8mm). The program then runs only on processors that have them;
 * the library, which chooses at run time, has no such limit, and kernels for AVX-VNNI and AMX too.
 *
 * Stored bytes must not depend on what the compiler fuses or reorders. Contraction is turned off
 * below (clang heeds that but with -ffp-contract=fast: do not give it); -ffast-math and its parts
 * are refused. -fno-math-errno and -DNDEBUG save some time.
 *
 * KVT_NO_POOL, if defined, leaves out the pool of threads. KVT_STATIC: no symbol is exported.
 * KVT_CRYPT: snapshots can be encrypted, and prefixes put into stores (store.h); link with -lsodium
 * too. KVT_CIPHER, with that: by OpenSSL, twice as fast; link with -lcrypto too. KVT_REDIS: stores
 * can be on Redis or Valkey; link with -lhiredis too. KVT_TLS, with that: by TLS; link with -lssl
 * -lcrypto too (OpenSSL 1.1.1 or newer).
 */
#if defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) ||      \\
    (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__) || defined(__NO_SIGNED_ZEROS__)
#error "kvtile.c needs exact floating point: compile it without -ffast-math and its parts"
#endif
#if defined(__FLT_EVAL_METHOD__) && __FLT_EVAL_METHOD__ != 0 && __FLT_EVAL_METHOD__ != 16
#error "kvtile.c needs f32 arithmetic of 32 bits: on 32-bit x86 compile it with -msse2 -mfpmath=sse"
#endif
#if !defined(__STDC_VERSION__) || __STDC_VERSION__ < 201112L
#error "kvtile.c needs a C compiler, C11 or newer"
#endif
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
/* Of the inline functions of internal headers some are for one instruction set only. */
#pragma clang diagnostic ignored "-Wunused-function"
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#else
#error "kvtile.c has been checked with gcc and clang only"
#endif
#if !defined(KVT_NO_POOL)
#define KVT_HAVE_POOL
#endif
#if defined(KVT_CRYPT)
#define KVT_HAVE_CRYPT
#endif
#if defined(KVT_CIPHER)
#define KVT_HAVE_CIPHER
#endif
#if defined(KVT_REDIS)
#define KVT_HAVE_REDIS
#endif
#if defined(KVT_TLS)
#define KVT_HAVE_TLS
#endif
"""

# The public ones, which lie beside kvtile.c.
HEADERS = ["kvtile/kvtile.h", "kvtile/store.h"]

TOKEN = re.compile(r'#pragma[^\n]*|/\*.*?\*/|"(?:[^"\\\n]|\\.)*"|' r"'(?:[^'\\\n]|\\.)*'"
                   r"|[A-Za-z_]\w*|##|->|\d[\w.]*|[ \t]+|.", re.DOTALL)
IDENTIFIER = re.compile(r"[A-Za-z_]\w*$")
ATTRIBUTES = {"__attribute__", "_Alignas"}


class File:
    def __init__(self, root, path):
        self.path = path
        self.stem = path.stem
        self.isa = next((isa for isa in ISAS if path.match(f"simd/{isa[1]}/{isa[2]}*")), None)
        self.arch = path.parts[1] if path.parts[0] == "simd" and len(path.parts) == 3 else None
        if self.arch and not self.isa: # a header of all that the architecture has
            self.isa = next(isa for isa in ISAS if isa[1] == self.arch)
        self.text = (root / path).read_text()
        if path.suffix == ".h":
            self.text = re.sub(r"\n#ifndef (\w+_H)\n#define \1\n(.*)\n#endif[^\n]*\n$", r"\n\2\n",
                               self.text, count=1, flags=re.DOTALL)
        # Feature macros and "#define ..._STATIC_LINKING_ONLY" go to the top of the whole.
        self.text = re.sub(r"#ifndef (_\w+_SOURCE)\n#define \1[^\n]*\n#endif\n", "", self.text)
        self.text = re.sub(r"^ *#define (_\w+_SOURCE|\w+_STATIC_LINKING_ONLY)\b[^\n]*\n", "",
                           self.text, flags=re.MULTILINE)
        self.text = re.sub(r"^#if [^\n]*\n#endif\n", "", self.text, flags=re.MULTILINE)
        self.includes = []   # paths of internal headers
        self.system = []     # "<...>", those outside conditions
        lines, depth = [], 0
        for line in self.text.split("\n"):
            include = re.match(r' *# *include ([<"])([^>"]+)[>"]', line)
            if include and include[1] == '"':
                name = include[2]
                local = path.parent / name
                self.includes.append(local if (root / local).exists() else pathlib.Path(name))
                continue
            if include and include[2] in HEADERS:
                continue
            if include and depth == 0 and self.arch is None:
                self.system.append(include[2])
                continue
            if include: # what it declares is not hidden
                line = f"#pragma GCC visibility pop\n{line}\n#pragma GCC visibility push(hidden)"
            depth += bool(re.match(r" *# *if", line)) - bool(re.match(r" *# *endif", line))
            lines.append(line)
        assert depth == 0, path
        self.text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n") + "\n"
        self.code = re.sub(r"/\*.*?\*/", " ", self.text, flags=re.DOTALL)
        self.renames = {}

    def macros(self, left=True):
        """Those that are defined in it, or still defined at its end."""
        found = {}
        for what, name in re.findall(r"^ *# *(define|undef) +(\w+)", self.code, re.MULTILINE):
            found[name] = what == "define" or not left
        return [name for name, defined in found.items() if defined]

    def definition(self, macro):
        return re.findall(rf"^ *# *define {macro}\b(?:[^\n]*\\\n)*[^\n]*", self.code,
                          re.MULTILINE)

    def function_macros(self):
        return re.findall(r"^#define (\w+)\(([^)]*)\)((?:[^\n]*\\\n)*[^\n]*)", self.code,
                          re.MULTILINE)

    def names(self):
        """Static functions and objects, types, tags and enumerators of the file's outer level."""
        code = re.sub(r"^ *#(?:[^\n]*\\\n)*[^\n]*", "", self.code, flags=re.MULTILINE)
        code = re.sub(r"^[A-Z]\w*\([^;{}]*?\)$", "", code, flags=re.MULTILINE) # uses of macros
        names, statement, depth = [], [], 0
        for token in (t for t in TOKEN.findall(code) if not t.isspace()):
            depth -= token in ")}]"
            statement.append((token, depth))
            depth += token in "({["
            ends = depth == 0 and (token == ";" or token == "}" and not self.is_value(statement))
            if ends:
                names += self.declared(statement)
                statement = []
        return names

    def made_by_macros(self, macros):
        """Static names that are arguments of macros: [(name, parameters, body)]."""
        names = []
        for macro, parameters, body in macros:
            parameters = parameters.split(", ")
            for linkage, name in re.findall(
                    r"\b(static|KVT_INLINE|linkage)\b[^(;{}#]* (\w+)\(", body):
                for arguments in re.findall(rf"^{macro}\((.*)\)$", self.code, re.MULTILINE):
                    value = dict(zip(parameters, arguments.split(", ")))
                    if name in value and value.get(linkage, "static") == "static":
                        names.append(value[name])
        return names

    @staticmethod
    def is_value(statement):
        """Whether a closing brace does not end a function: of a type or an initializer."""
        outer = [token for token, depth in statement if depth == 0]
        return "=" in outer or outer[0] == "typedef" or "(" not in outer

    @staticmethod
    def declared(statement):
        outer = [token for token, depth in statement if depth == 0]
        names = []
        if outer[0] == "typedef":
            last = [token for token, depth in statement if IDENTIFIER.match(token) and depth <= 1]
            inner = re.search(r"\( ?\* ?(\w+) ?\)", " ".join(t for t, _ in statement))
            function = re.search(r"(\w+) \( \) ;$", " ".join(outer))
            names.append(inner[1] if inner and "{" not in outer else
                         function[1] if function else last[-1])
        elif outer[0] in ("static", "KVT_INLINE"):
            before = []
            skip = False
            for token in outer:
                if token in ATTRIBUTES:
                    skip = True
                elif skip and token == ")":
                    skip = False
                elif not skip and token in ("(", "[", "=", ";"):
                    break
                elif not skip and IDENTIFIER.match(token):
                    before.append(token)
            names.append(before[-1])
        for kind, name, brace in zip(outer, outer[1:], outer[2:]):
            if kind in ("struct", "union", "enum") and IDENTIFIER.match(name) and brace == "{":
                names.append(name)
        if "enum" in outer and "{" in outer:
            body = " ".join(token for token, depth in statement if depth == 1)
            names += re.findall(r"(?:^|, )(\w+)", body)
        return names

    def pasted(self):
        """Beginnings of names that its macros paste."""
        return {name for name in re.findall(r"(?<![#\w])(\w+_)##", self.code)
                if name.islower() and name != "_" and not re.match("kvt_|_mm", name)}


def renamed(file, renames, beginnings, kernels):
    """Its text with names replaced, other than of members, and beginnings of names likewise."""
    if file.stem in TEMPLATES:
        prefix = file.stem + "_"
        text = re.sub(r"_KERNELS\(static, ,", f"_KERNELS(static, {prefix},", file.text)
        text = re.sub(r"(\.\w+ = )(\w+,)$", rf"\1{prefix}\2", text, flags=re.MULTILINE)
        file.text = "".join(f"#define {name} {prefix}{name}\n" for name in PASTED) + "\n" + text
        file.text += "\n" + "".join(f"#undef {name}\n" for name in PASTED)
        renames = {name: to for name, to in renames.items() if name not in PASTED}
        beginnings = ()
    # A kernel's name in a macro's arguments becomes part of a kvt_ name.
    fixed = {token for line in re.findall(r"^[A-Z]\w*\(.*", file.code, re.MULTILINE)
             for token in re.findall(r"\w+", line) if token in kernels}
    tokens = TOKEN.findall(file.text)
    code = [i for i, token in enumerate(tokens) if not token.isspace() and token[:2] != "/*"]
    behind = dict(zip(code, [tokens[i] for i in code[1:]])) # of a token the next one
    out, before, before_that = [], "", ""
    bodies = [] # of the braces around, whether they are a struct's
    for i, token in enumerate(tokens):
        if token == "{":
            bodies.append("struct" in (before, before_that) or "union" in (before, before_that))
        elif token == "}" and bodies:
            bodies.pop()
        member = before in (".", "->") or (bodies and bodies[-1] and
                                           behind.get(i) in (";", ",", "[", ":"))
        if IDENTIFIER.match(token) and not member:
            if token in renames:
                out.append(renames[token])
            elif token not in fixed and any(token.startswith(b) for b in beginnings):
                parts = [renames.get(part, part) for part in token.split("_")]
                out.append(f"{file.stem}_{'_'.join(parts)}")
            else:
                out.append(token)
        else:
            out.append(token)
        if not token.isspace() and token[:2] != "/*":
            before_that, before = before, token
    return "".join(out)


def amalgamate(root):
    version = re.search(r"project\(kvtile VERSION ([\d.]+)", (root / "CMakeLists.txt").read_text())
    paths = [pathlib.Path("simd/scalar.c"), pathlib.Path("simd/scalar_4bit.c")]
    paths += sorted(p.relative_to(root) for p in (root / "src").rglob("*.c"))
    for isa in ISAS:
        paths += sorted(p.relative_to(root) for p in (root / "simd" / isa[1]).glob(isa[2] + "*.c"))

    files, order = {}, []

    def add(path):
        if path in files:
            return
        files[path] = file = File(root, path)
        for include in file.includes:
            add(include)
        order.append(file)

    for path in paths: # headers of no instruction set first: they are outside all conditions
        for include in File(root, path).includes:
            if not File(root, include).arch:
                add(include)
    for path in paths:
        add(path)

    def included(file):
        return {path for include in file.includes for path in {include} | included(files[include])}

    kernels = set(re.findall(r"X\(\w+, (\w+),", (root / "simd/kernels.h").read_text()))
    owner = {} # of (architecture, name)
    for file in sorted(order, key=lambda file: file.path.suffix == ".c"):
        header = file.path.suffix == ".h"
        macros = [m for path in {file.path} | included(file) for m in files[path].function_macros()]
        names = file.names() + file.made_by_macros(macros)
        for name in names + [m for m in file.macros(header)
                              if header or (file.arch, m) in owner]:
            others = [owner.get((arch, name)) for arch in {None, file.arch}]
            others = [o for o in others if o and o is not file and o.path not in included(file)]
            if not others:
                owner.setdefault((file.arch, name), file)
            elif (name not in file.macros(False)
                  or file.definition(name) != others[0].definition(name)):
                prefix = file.stem if name.islower() else file.stem.upper()
                file.renames[name] = f"{prefix}_{name}"

        # What a header's macros call, by its name or pasted, would be another file's.
        macros = {macro: body for path in included(file)
                  for macro, _, body in files[path].function_macros()}
        used, text = {}, file.code
        while text: # those that it uses, and those that these use
            new = {m for m in macros if m not in used and re.search(rf"\b{m}\b", text)}
            used.update((m, macros[m]) for m in new)
            text = "".join(macros[m] for m in new)
        bodies = list(used.values())
        called = {beginning for body in bodies for beginning in re.findall(r"\b(\w+_)##", body)}
        for name in file.renames:
            own = file.stem in TEMPLATES and name in PASTED
            if not own and (any(name.startswith(beginning) for beginning in called)
                            or any(re.search(rf"\b{name}\(", body) for body in bodies)):
                sys.exit(f"{file.path}: {name}, which another file has too, is called by a macro")

    def all_renames(file):
        result = {}
        for include in file.includes:
            result.update(all_renames(files[include]))
        result.update(file.renames)
        return result

    out = [HEAD % version[1]]
    for name, _, _, conditions in ISAS:
        joined = " && ".join(f"defined({c})" for c in conditions)
        while len(joined.split("\n")[-1]) > 80:
            at = joined.rfind(" && ", 0, joined.rfind("\n") + 80)
            joined = joined[:at] + " && \\\n    " + joined[at + 4:]
        out.append(f"#if {joined}\n#define KVT_HAVE_{name}\n#endif\n")
    out.append("#if !defined(_FILE_OFFSET_BITS) && __SIZEOF_POINTER__ == 4\n"
               "#define _FILE_OFFSET_BITS 64 /* files beyond 2 GiB */\n#endif\n"
               "#if !defined(_GNU_SOURCE)\n#define _GNU_SOURCE /* affinity, madvise, flock */\n"
               "#endif\n#define XXH_STATIC_LINKING_ONLY\n#define ZSTD_STATIC_LINKING_ONLY\n")
    system = sorted({name for file in order for name in file.system})
    out.append('#include "kvtile.h"\n#include "store.h"\n\n' + "".join(f"#include <{name}>\n" for name in system))
    out.append("#pragma GCC visibility push(hidden) /* but for what kvtile.h exports */\n")
    isa = None
    for file in order:
        if file.isa is not isa:
            if isa:
                out.append(f"#endif /* KVT_HAVE_{isa[0]} */\n")
            isa = file.isa
            out.append(f"#if defined(KVT_HAVE_{isa[0]})\n")
        out.append(f"/* ======== {file.path} ======== */\n")
        out.append(renamed(file, all_renames(file),
                           file.pasted() if file.path.suffix == ".c" else (), kernels))
        if file.path.suffix == ".c" and file.macros():
            out.append("".join(f"#undef {name}\n" for name in file.macros()))
    out.append(f"#endif /* KVT_HAVE_{isa[0]} */\n")
    out.append("#pragma GCC visibility pop\n")
    return "\n".join(out)


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    root, folder = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    text = amalgamate(root)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kvtile.c").write_text(text)
    for path in [f"include/{name}" for name in HEADERS + ["kvtile/kvtile.hpp", "kvtile/store.hpp"]] + ["LICENSE"]:
        if (root / path).exists():
            (folder / pathlib.Path(path).name).write_bytes((root / path).read_bytes())


main()
