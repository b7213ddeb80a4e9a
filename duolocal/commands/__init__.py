"""The commands of `duolocal`: each is a function that takes its options as frozen dataclasses.

Importing one is light, so that `--help` is quick: what a command needs is imported when it runs.
"""
