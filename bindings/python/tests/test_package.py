"""The package as users take it: README's programs, the wheel in a virtual environment, the sdist.

KVTILE_BUILD_DIR: the build tree. KVTILE_SAME_FLAGS: its library is what the sdist builds as well.
"""

import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unittest
import zipfile

from support import has_keys, torch

HERE = os.path.dirname(os.path.abspath(__file__))
PACKAGE = os.path.dirname(HERE)
BUILD = os.environ.get("KVTILE_BUILD_DIR")


def programs(language="python"):
    with open(os.path.join(PACKAGE, "README.md"), encoding="utf-8") as f:
        return re.findall(rf"^```{language}\n(.*?)^```", f.read(), re.M | re.S)


def can_run(program):
    return (torch or "torch" not in program) and (has_keys() or "kvtile.Store" not in program)


def can_make_environments():
    try:
        import ensurepip  # noqa: F401  (Debian: python3-venv)
        import venv  # noqa: F401
        return True
    except ImportError:
        return False


@unittest.skipUnless(BUILD, "KVTILE_BUILD_DIR is not set")
@unittest.skipUnless(can_make_environments(), "python3-venv is not installed")
class Package(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.mkdtemp(prefix="kvtile-")
        cls.addClassCleanup(shutil.rmtree, cls.folder)
        cls.python = os.path.join(cls.folder, "venv", "bin", "python")
        cls.run_(sys.executable, "-m", "venv", "--system-site-packages", "venv")
        cls.wheel = cls.build(PACKAGE, KVTILE_BUILD_DIR=BUILD)

    @classmethod
    def run_(cls, *command, cwd=None, **environment):
        """In an environment without what would lead to the source tree."""
        env = {k: v for k, v in os.environ.items()
               if not k.startswith(("KVTILE", "PYTHON", "PIP_")) and k not in ("CFLAGS", "LDFLAGS")}
        env.update(environment, PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_CONFIG_FILE=os.devnull)
        result = subprocess.run(command, cwd=cwd or cls.folder, env=env, capture_output=True,
                                text=True)
        if result.returncode:
            raise AssertionError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
        return result.stdout

    @classmethod
    def build(cls, source, **environment):
        out = tempfile.mkdtemp(dir=cls.folder)
        cls.run_(cls.python, "-m", "pip", "wheel", "--no-index", "--no-deps",
                 "--no-build-isolation", "-w", out, source, **environment)
        name, = os.listdir(out)
        return os.path.join(out, name)

    def test_wheel_in_environment(self):
        """Installs offline, runs README's programs and our tests with its own library, and goes."""
        self.assertRegex(os.path.basename(self.wheel), r"^kvtile-[\d.]+-py3-none-linux_\w+\.whl$")
        self.run_(self.python, "-m", "pip", "install", "--no-index", "--no-deps", self.wheel)
        where = self.run_(self.python, "-c", "import kvtile; print(kvtile.__file__)").strip()
        self.assertTrue(where.startswith(os.path.join(self.folder, "venv")), where)
        maps = self.run_(self.python, "-c", "import kvtile; print(open('/proc/self/maps').read())")
        used = set(re.findall(r"/\S*libkvtile\S*", maps))
        self.assertEqual(used, {os.path.join(os.path.dirname(where), "libkvtile.so.0")})
        self.assertTrue(os.path.exists(os.path.join(os.path.dirname(where), "py.typed")))
        for text in programs():
            if can_run(text):
                self.run_(self.python, "-c", text)
        self.run_(self.python, os.path.join(HERE, "run.py"), "test_sequence.Steps", "test_arrays",
                  PYTHONDONTWRITEBYTECODE="1")
        self.run_(self.python, "-m", "pip", "uninstall", "-y", "kvtile")
        self.assertFalse(os.path.exists(os.path.dirname(where)))

    def test_readme_commands(self):
        """README's commands in a copy of the sources, which they leave as it was."""
        root = os.path.dirname(os.path.dirname(PACKAGE))
        if not os.path.exists(os.path.join(root, "CMakeLists.txt")):
            self.skipTest("not in a clone")
        clone = os.path.join(self.folder, "clone")
        for name in ("CMakeLists.txt", "LICENSE"):
            os.makedirs(clone, exist_ok=True)
            shutil.copy(os.path.join(root, name), clone)
        for name in ("cmake", "include", "simd", "src", "bindings/python"):
            shutil.copytree(os.path.join(root, name), os.path.join(clone, name),
                            ignore=shutil.ignore_patterns("__pycache__"))

        def files():
            return {os.path.join(folder, f) for folder, _, names in os.walk(clone)
                    for f in names if "__pycache__" not in folder}

        before = files()
        commands, = programs("sh")
        # The build tree's library: test_sdist builds one.
        # python3 is the one that runs the tests: another may lack NumPy.
        path = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
        self.run_("sh", "-ec", commands, cwd=clone, KVTILE_BUILD_DIR=BUILD, PATH=path)
        environment = os.path.join(clone, "venv")
        python = os.path.join(environment, "bin", "python")
        self.assertIn(environment, self.run_(python, "-c", "import kvtile; print(kvtile.__file__)"))
        shutil.rmtree(environment)
        self.assertEqual(files(), before)

    def test_record(self):
        """RECORD names each file with its hash, and the same sources give the same bytes."""
        with zipfile.ZipFile(self.wheel) as z:
            names = z.namelist()
            record_name, = [n for n in names if n.endswith("/RECORD")]
            record = z.read(record_name).decode().splitlines()
            self.assertEqual([r.rsplit(",", 2)[0] for r in record], names)
            for line in record[:-1]:
                name, digest, size = line.rsplit(",", 2)
                found = base64.urlsafe_b64encode(hashlib.sha256(z.read(name)).digest())
                self.assertEqual((digest, int(size)), ("sha256=" + found.decode().rstrip("="),
                                                       len(z.read(name))))
            self.assertEqual(names.count("kvtile/libkvtile.so.0"), 1)
        with open(self.wheel, "rb") as a, open(self.build(PACKAGE, KVTILE_BUILD_DIR=BUILD),
                                               "rb") as b:
            self.assertEqual(a.read(), b.read())

    def test_settings(self):
        """cmake.define.NAME goes into the command that configures."""
        backend = os.path.join(PACKAGE, "build_backend")
        code = ("import kvtile_backend as b; print(b._defines({'cmake.define.KVTILE_REDIS': 'OFF', 'x': '1',"
                "'cmake.define.A': ['1', '2']}), b._defines(None))")
        out = self.run_(self.python, "-c", code, PYTHONPATH=backend, PYTHONDONTWRITEBYTECODE="1")
        self.assertEqual(out, "['-DKVTILE_REDIS=OFF', '-DA=1', '-DA=2'] []\n")

    def test_sdist(self):
        """It has all that it needs: the wheel from it is the wheel from the tree."""
        backend = os.path.join(PACKAGE, "build_backend")
        code = "import sys, kvtile_backend as b; print(b.build_sdist(sys.argv[1]))"
        hashes = set()
        for _ in range(2):
            name = self.run_(self.python, "-c", code, self.folder, PYTHONPATH=backend,
                             PYTHONDONTWRITEBYTECODE="1").strip()
            with open(os.path.join(self.folder, name), "rb") as f:
                hashes.add(hashlib.sha256(f.read()).hexdigest())
        self.assertEqual(len(hashes), 1)
        with tarfile.open(os.path.join(self.folder, name)) as tar:
            tar.extractall(self.folder)
        source = os.path.join(self.folder, name[:-len(".tar.gz")])
        with open(os.path.join(source, "PKG-INFO"), encoding="utf-8") as f:
            self.assertIn("\nLicense: MIT\nLicense-File: LICENSE\n", f.read())
        with open(os.path.join(source, "LICENSE"), "rb") as a, \
                open(os.path.join(source, "native", "LICENSE"), "rb") as b:
            self.assertEqual(a.read(), b.read())
        environment = {"CMAKE_BUILD_PARALLEL_LEVEL": "2"}
        if os.environ.get("KVTILE_CC"):
            environment["CC"] = os.environ["KVTILE_CC"]
        built = self.build(source, **environment)
        with zipfile.ZipFile(built) as ours, zipfile.ZipFile(self.wheel) as tree:
            self.assertEqual(ours.namelist(), tree.namelist())
            for entry in ours.namelist():
                if entry.endswith((".so.0", "RECORD")) and not os.environ.get("KVTILE_SAME_FLAGS"):
                    continue  # a build of another type or compiler
                self.assertTrue(ours.read(entry) == tree.read(entry), entry)
        self.assertEqual(os.path.basename(built), os.path.basename(self.wheel))


class Readme(unittest.TestCase):
    def test_programs(self):
        """In the source tree, with the build's library."""
        listed = programs()
        self.assertEqual(len(listed), 3)
        with tempfile.TemporaryDirectory() as folder:
            for text in listed:
                if not can_run(text):
                    continue
                result = subprocess.run([sys.executable, "-c", text], cwd=folder,
                                        capture_output=True, text=True)
                self.assertEqual(result.returncode, 0, result.stderr)


if __name__ == "__main__":
    unittest.main()
