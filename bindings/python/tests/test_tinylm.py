"""The NumPy transformer of examples/tinylm.py: the text of the C program, byte for byte."""

import os
import subprocess
import sys
import tempfile
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
SCRIPT = os.path.join(HERE, "..", "examples", "tinylm.py")
PROGRAM = os.environ.get("KVTILE_TINYLM")  # examples/tinylm's, built
DATA = os.environ.get("KVTILE_TINYLM_DATA")
QUESTION = ("The hat of Anna is red. Question: What colour is the hat of Anna? "
            "Answer: The hat of Anna is")


@unittest.skipUnless(PROGRAM and DATA, "KVTILE_TINYLM is not set: examples are not built")
class TinyLm(unittest.TestCase):
    def text(self, command, *arguments):
        result = subprocess.run([*command, *arguments], capture_output=True)
        self.assertEqual(result.returncode, 0, result.stderr)
        return result.stdout

    def both(self, *arguments):
        ours = self.text([sys.executable, SCRIPT, "--data", DATA], *arguments)
        self.assertEqual(ours, self.text([PROGRAM, "generate"], *arguments))
        return ours

    def test_types(self):
        for k, v, seed in (("f32", "f32", "0"), ("f16", "i8", "1"), ("i8", "i8", "2"),
                           ("i4", "i5", "3")):
            with self.subTest(k=k, v=v):
                text = self.both("--k", k, "--v", v, "--seed", seed, "-n", "200")
                self.assertGreater(len(text), 400)

    def test_greedy_and_ids(self):
        ids = self.both("--temperature", "0", "--prompt", QUESTION, "-n", "40", "--ids")
        self.assertGreaterEqual(len(ids.split()), 30)

    def test_long_prompt(self):
        """More than one step of prefill, and characters that are no tokens."""
        story = self.text([PROGRAM, "stories", "--seed", "3", "--tokens", "500"]).decode()
        self.both("--k", "i8", "--v", "i8", "--prompt", story + " Zoë \N{SNOWMAN}", "-n", "60")

    def test_bad_files(self):
        for name, content in (("no model", b"TLMX" + bytes(60)), ("cut", None)):
            with tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, "tinylm.f16.bin")
                with open(os.path.join(DATA, "tinylm.f16.bin"), "rb") as f:
                    data = f.read()
                with open(path, "wb") as f:
                    f.write(content if content is not None else data[:-2])
                result = subprocess.run([sys.executable, SCRIPT, "--data", folder],
                                        capture_output=True, text=True)
                self.assertEqual(result.returncode, 1, name)
                self.assertIn(path, result.stderr)
                self.assertNotIn("Traceback", result.stderr)


if __name__ == "__main__":
    unittest.main()
