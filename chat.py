"""`python chat.py …` is `duolocal chat …`: the terminal chat from a checkout."""

import sys

from duolocal.cli import main

if __name__ == "__main__":
    sys.exit(main(["chat", *sys.argv[1:]]))
