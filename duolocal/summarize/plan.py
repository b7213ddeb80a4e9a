"""How a document is read: in one piece where it fits, else in parts whose summaries are merged."""

from collections.abc import Sequence
from dataclasses import dataclass

from duolocal.documents import Document
from duolocal.errors import ContextOverflowError, SettingsError
from duolocal.summarize.frame import Frame
from duolocal.summarize.split import Piece, cut

BETWEEN = "\n\n"  # between the summaries of parts
_SLACK = 8  # tokens: what stands next to a text may change how its ends are written
MIN_PART = 128  # tokens of text that one reading must hold: two short summaries to be merged


@dataclass(frozen=True)
class Plan:
    """The pieces of one document."""

    text: str
    tokens: int
    pieces: tuple[Piece, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """What is worth telling of the cuts."""
        inside = sum(piece.inside_word for piece in self.pieces[:-1])
        if not inside:
            return ()
        return (f"cut inside a word at {inside} of {len(self.pieces) - 1} borders: it has no space or sentence there",)


def part_limit(frame: Frame, *, context: int, max_tokens: int, wanted: int | None = None) -> int:
    """Return how many tokens of text one reading holds, at most `wanted`; raises SettingsError for too few."""
    room = context - frame.overhead - _SLACK - max_tokens
    if wanted is not None and wanted < MIN_PART:
        raise SettingsError(f"--part-tokens is {wanted:,}: give {MIN_PART} or more")
    if room < MIN_PART:
        raise SettingsError(
            f"a context of {context:,} leaves {max(0, room):,} tokens for text beside the prompt ({frame.overhead:,}) "
            f"and an answer of up to {max_tokens:,}: give --context {context - room + MIN_PART} or more, or a smaller "
            "--max-tokens or --length"
        )
    return room if wanted is None else min(room, wanted)


def part_answer(limit: int, max_tokens: int) -> int:
    """Return how long the summary of a part may be: two of them fit into one reading, so that merging ends."""
    return min(max_tokens, limit // 2 - _SLACK)


def make_plan(document: Document, frame: Frame, *, limit: int) -> Plan:
    """Return how to read `document` in pieces of at most `limit` tokens."""
    text = document.text.strip("\n")
    tokens = frame.count(text)
    if tokens <= limit:
        return Plan(text, tokens, (Piece(0, len(text), tokens),))
    shift = len(document.text) - len(document.text.lstrip("\n"))
    starts = [part.start - shift for part in document.parts if part.start > shift]
    return Plan(text, tokens, tuple(cut(text, frame.count, limit=limit, parts=starts)))


def group(summaries: Sequence[str], frame: Frame, *, limit: int) -> list[list[str]]:
    """Return the summaries in groups that fit into one reading each, as even as they come; one group where all do.

    Raises ContextOverflowError where not even two fit, which would not end.
    """
    sizes = [frame.count(summary + BETWEEN) for summary in summaries]
    num_groups = -(-sum(sizes) // limit)
    aim = sum(sizes) / num_groups
    groups: list[list[str]] = []
    used = limit
    for summary, size in zip(summaries, sizes, strict=True):
        if not groups or used + size > limit or used >= aim:
            groups.append([])
            used = 0
        groups[-1].append(summary)
        used += size
    if len(groups) == len(summaries) > 1:
        raise ContextOverflowError(
            f"no two of its {len(summaries):,} summaries of parts fit into {limit:,} tokens: give a larger --context "
            "or a smaller --length"
        )
    return groups
