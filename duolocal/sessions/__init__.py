"""Contexts on disk: files of computed contexts, named sessions, the store of documents that were read."""
