"""A chat without a terminal: how one is opened and kept, and `Chat`, the front door for Python (docs/python.md)."""
