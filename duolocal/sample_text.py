"""Real English prose and code that every Python carries: the text of measurements, so that none needs a download."""

import pydoc_data.topics


def sample_text() -> str:
    """Return about half a megabyte: the topics of Python's own help, in order of their names."""
    topics: dict[str, str] = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))
