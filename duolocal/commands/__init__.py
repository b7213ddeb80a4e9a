"""What each command of `duolocal` takes, as frozen dataclasses, and which function of `duolocal.terminal` it runs.

Importing one is light, so that `--help` is quick.
"""
