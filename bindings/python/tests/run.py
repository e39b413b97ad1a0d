"""Run test modules of this folder: run.py NAME ... Exit status 77 where nothing could be tested."""

import os
import sys
import unittest

sys.dont_write_bytecode = True
try:
    import numpy  # noqa: F401
except ImportError:
    print("skipped: NumPy is not installed")
    sys.exit(77)

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
suite = unittest.defaultTestLoader.loadTestsFromNames(sys.argv[1:])
result = unittest.TextTestRunner(verbosity=2).run(suite)
if result.testsRun == 0 and not result.skipped:
    sys.exit("no test was found")
if not result.wasSuccessful():
    sys.exit(1)
sys.exit(77 if result.testsRun == len(result.skipped) else 0)
