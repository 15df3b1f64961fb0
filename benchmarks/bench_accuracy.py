"""What sparse attention costs in accuracy, beside H2O and a sliding window: the same as `torch-csd bench accuracy`."""

from __future__ import annotations

import sys

from torch_csd.cli import app

if __name__ == "__main__":
    app(["bench", "accuracy", *sys.argv[1:]])
