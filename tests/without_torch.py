"""`python -m without_torch MODULE …` is `python -m MODULE …` on a machine that has no torch.

transformers imports torch wherever it is installed, which takes seconds in every process of a test.
"""

import importlib.util
import runpy
import sys


def hide_torch():
    """Makes importlib say that torch is not installed, which is what transformers asks."""
    find_spec = importlib.util.find_spec

    def find_another(name, package=None):
        return None if name == "torch" else find_spec(name, package)

    importlib.util.find_spec = find_another


if __name__ == "__main__":
    hide_torch()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
