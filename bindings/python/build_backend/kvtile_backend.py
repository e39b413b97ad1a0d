"""PEP 517 backend of kvtile's Python package: the standard library, CMake and a C compiler.

build_wheel   builds libkvtile with CMake and puts it beside the package: one wheel for a platform
              and every Python 3, as the binding is ctypes. It is linked with the system's SLEEF,
              Zstandard and xxHash, so its tag is linux_..., not manylinux.
build_sdist   the package and the C sources, in native/, from which build_wheel works offline.

$KVTILE_BUILD_DIR: a build tree of CMake to take the library from (its target kvtile_shared is
built), in place of one of its own. Files are sorted and have the time of $SOURCE_DATE_EPOCH, or
1980: the same sources give the same bytes.

config_settings: cmake.define.NAME (a text, or a list of them, of which CMake takes the last) sets
NAME when the library is configured.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import zipfile
from typing import Dict, List, Optional, Tuple

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NATIVE = ("CMakeLists.txt", "LICENSE", "cmake", "include", "simd", "src")
PACKAGE = ("README.md", "bench_overhead.py", "build_backend", "examples", "pyproject.toml", "src",
           "tests")
SONAME = "libkvtile.so.0"
SUMMARY = "A quantized KV cache for transformers, with attention in place and snapshots"


def _native() -> str:
    """The C sources: native/ of an sdist, else the repository around."""
    inside = os.path.join(HERE, "native")
    return inside if os.path.isdir(inside) else os.path.dirname(os.path.dirname(HERE))


def _version() -> str:
    with open(os.path.join(HERE, "src", "kvtile", "_lib.py"), encoding="utf-8") as f:
        found = re.search(r'^VERSION = "([^"]+)"$', f.read(), re.M)
    with open(os.path.join(_native(), "CMakeLists.txt"), encoding="utf-8") as f:
        native = re.search(r"^project\(kvtile VERSION (\S+)", f.read(), re.M)
    if not found or not native or found[1] != native[1]:
        raise RuntimeError(f"the package's version {found and found[1]} is not that of the C "
                           f"library, {native and native[1]}")
    return found[1]


def _metadata() -> bytes:
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as f:
        readme = f.read()
    return (f"Metadata-Version: 2.1\nName: kvtile\nVersion: {_version()}\nSummary: {SUMMARY}\n"
            "License: MIT\nLicense-File: LICENSE\nRequires-Python: >=3.8\nRequires-Dist: numpy>=1.22\n"
            f"Description-Content-Type: text/markdown\n\n{readme}").encode()


def _epoch() -> int:
    return max(int(os.environ.get("SOURCE_DATE_EPOCH", "315532800")), 315532800)


def _files(root: str, names: Tuple[str, ...]) -> List[Tuple[str, str]]:
    """(name below root, path), sorted; without caches and build trees."""
    out = []
    for name in names:
        path = os.path.join(root, name)
        if os.path.isfile(path):
            out.append((name, path))
        for folder, folders, files in os.walk(path):
            folders[:] = [x for x in folders if x != "__pycache__" and not x.startswith(".")]
            for f in files:
                if not f.endswith((".pyc", ".kvt")) and ".so" not in f:  # nor .so.0
                    full = os.path.join(folder, f)
                    out.append((os.path.relpath(full, root), full))
    return sorted(out)


# ---- the library ----


def _run(*command: str) -> None:
    print(" ".join(command), flush=True)
    try:
        subprocess.run(command, check=True, stdout=sys.stdout, stderr=subprocess.STDOUT)
    except FileNotFoundError:
        raise RuntimeError(f"{command[0]} is not installed") from None


# The sources as a part of a project: nothing of theirs but the library is built or looked for.
PROJECT = """cmake_minimum_required(VERSION 3.25)
project(kvtile_python LANGUAGES C)
add_subdirectory("{}" kvtile)
"""


def _defines(settings: Optional[dict]) -> List[str]:
    out = []
    for key, value in (settings or {}).items():
        if key.startswith("cmake.define."):
            for one in value if isinstance(value, (list, tuple)) else [value]:
                out.append(f"-D{key[len('cmake.define.'):]}={one}")
    return out


def _library(settings: Optional[dict] = None) -> bytes:
    given = os.environ.get("KVTILE_BUILD_DIR")
    work = tempfile.mkdtemp(prefix="kvtile-")
    build = given or os.path.join(work, "build")
    try:
        if not given:
            with open(os.path.join(work, "CMakeLists.txt"), "w", encoding="utf-8") as f:
                f.write(PROJECT.format(_native()))
            generator = ["-G", "Ninja"] if shutil.which("ninja") else []
            _run("cmake", "-S", work, "-B", build, *generator, "-DCMAKE_BUILD_TYPE=Release",
                 *_defines(settings))
        # Of a given tree with several configurations, one of them.
        config = os.environ.get("KVTILE_BUILD_CONFIG", "") if given else ""
        _run("cmake", "--build", build, "--target", "kvtile_shared",
             *(["--config", config] if config else []), "--parallel",
             os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1)))
        with open(os.path.join(build, config if given else "kvtile", SONAME), "rb") as library:
            return library.read()
    finally:
        shutil.rmtree(work, ignore_errors=True)


# ---- PEP 517 ----


def _tag() -> str:
    platform = re.sub(r"[-.]", "_", sysconfig.get_platform())
    if struct.calcsize("P") == 4:  # an interpreter of 32 bits on a kernel of 64, as pip names it
        platform = {"linux_x86_64": "linux_i686",
                    "linux_aarch64": "linux_armv7l"}.get(platform, platform)
    return "py3-none-" + platform


def _dist_info() -> Dict[str, bytes]:
    folder = f"kvtile-{_version()}.dist-info/"
    with open(os.path.join(_native(), "LICENSE"), "rb") as f:
        licence = f.read()
    return {
        folder + "METADATA": _metadata(),
        folder + "WHEEL": ("Wheel-Version: 1.0\nGenerator: kvtile_backend\n"
                           f"Root-Is-Purelib: false\nTag: {_tag()}\n").encode(),
        folder + "LICENSE": licence,
    }


def get_requires_for_build_wheel(config_settings: Optional[dict] = None) -> List[str]:
    return []


def get_requires_for_build_sdist(config_settings: Optional[dict] = None) -> List[str]:
    return []


def prepare_metadata_for_build_wheel(metadata_directory: str,
                                     config_settings: Optional[dict] = None) -> str:
    for name, data in _dist_info().items():
        path = os.path.join(metadata_directory, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as f:
            f.write(data)
    return f"kvtile-{_version()}.dist-info"


def build_wheel(wheel_directory: str, config_settings: Optional[dict] = None,
                metadata_directory: Optional[str] = None) -> str:
    contents: Dict[str, bytes] = {"kvtile/" + SONAME: _library(config_settings)}
    for name, path in _files(os.path.join(HERE, "src"), ("kvtile",)):
        with open(path, "rb") as f:
            contents[name] = f.read()
    info = _dist_info()
    record = ""
    for name, data in [*sorted(contents.items()), *sorted(info.items())]:
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(data)}\n"
    record_name = f"kvtile-{_version()}.dist-info/RECORD"
    record += f"{record_name},,\n"
    wheel = f"kvtile-{_version()}-{_tag()}.whl"
    stamp = time.gmtime(_epoch())[:6]
    with zipfile.ZipFile(os.path.join(wheel_directory, wheel), "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in [*sorted(contents.items()), *sorted(info.items()),
                           (record_name, record.encode())]:
            entry = zipfile.ZipInfo(name, stamp)
            entry.external_attr = (0o100755 if name.endswith(SONAME) else 0o100644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            z.writestr(entry, data)
    return wheel


def build_sdist(sdist_directory: str, config_settings: Optional[dict] = None) -> str:
    root = f"kvtile-{_version()}"
    files = {f"{root}/{name}": path for name, path in _files(HERE, PACKAGE)}
    for name, path in _files(_native(), NATIVE):
        files[f"{root}/native/{name}"] = path
    files[f"{root}/LICENSE"] = os.path.join(_native(), "LICENSE")  # where PKG-INFO says it is
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, path in [*sorted(files.items()), (f"{root}/PKG-INFO", "")]:
            if path:
                with open(path, "rb") as f:
                    data = f.read()
            else:
                data = _metadata()
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime, entry.mode = len(data), _epoch(), 0o644
            tar.addfile(entry, io.BytesIO(data))
    sdist = f"{root}.tar.gz"
    with open(os.path.join(sdist_directory, sdist), "wb") as f:
        with gzip.GzipFile(filename="", mode="wb", fileobj=f, mtime=_epoch()) as z:
            z.write(raw.getvalue())
    return sdist
