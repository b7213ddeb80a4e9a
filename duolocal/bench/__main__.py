"""`python -m duolocal.bench WHAT`: the same as `duolocal bench WHAT`, where duolocal is not installed."""

import importlib
import sys

# By name: benchmarks are a floor below the command line and import nothing of it.
sys.exit(importlib.import_module("duolocal.cli").main(["bench", *sys.argv[1:]]))
