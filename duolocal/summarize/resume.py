"""What of an earlier run still stands: which records belong to which inputs.

A record belongs to an input of the same bytes, the same prompt and settings, and the same occurrence among equal ones.
Names and places in the order do not matter: files may be renamed, moved, added and removed between runs.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from duolocal.errors import SettingsError
from duolocal.summarize.inputs import Input
from duolocal.summarize.records import Record

# What a record tells, but does not depend on: the same weights are the same model wherever they lie.
INFORMATIVE = frozenset({"model", "device", "dtype", "heads_source", "prompt"})
_WORDS = {
    "fingerprint": "another model",
    "tokenizer": "another tokenizer",
    "heads_digest": "another choice of heads",
}


@dataclass(frozen=True)
class Standing:
    """What an earlier run left."""

    done: Mapping[int, Record]  # by index of the input
    num_failed: int = 0  # to be tried again
    num_changed: int = 0  # of documents that have changed since: done anew
    others: tuple[Record, ...] = ()  # of documents that are not among the inputs: kept, after all others

    def in_order(self, more: Iterable[Record] = ()) -> list[Record]:
        """Return the records that stand, and those of `more` that are new, in the order of the inputs."""
        known = (*self.done.values(), *self.others)
        records = [*self.done.values(), *(record for record in more if record not in known)]
        return [*sorted(records, key=lambda record: record.index), *self.others]


def stand(
    records: Sequence[Record], inputs: Sequence[Input], settings: Mapping[str, Any], *, out: object = "OUT"
) -> Standing:
    """Match an earlier run's records with the inputs. Raises SettingsError where the settings differ."""
    records = [record for record in records if record.finish_reason != "skipped"]  # said anew by every run
    for record in records:
        check_same(record.settings, settings, out=out)
    wanted: dict[tuple[str | None, int], Input] = {
        (item.digest, item.occurrence): item for item in inputs if item.digest is not None
    }
    names = {item.name for item in inputs}
    done: dict[int, Record] = {}
    left: list[Record] = []
    for record in records:
        item = wanted.get((record.digest, record.occurrence)) if record.error is None else None
        if item is not None and item.index not in done:
            done[item.index] = replace(record, index=item.index, name=item.name, source=item.source)
        else:
            left.append(record)
    digests = {item.digest for item in inputs}
    stale = [item for item in left if item.name in names or (item.error is not None and item.digest in digests)]
    others = tuple(record for record in left if record not in stale)
    num_failed = sum(record.error is not None for record in stale)
    return Standing(done, num_failed, len(stale) - num_failed, others)


def check_same(there: Mapping[str, Any], wanted: Mapping[str, Any], *, out: object) -> None:
    """Raise SettingsError, naming the first difference, where summaries were made with other settings."""
    for name in (*wanted, *(name for name in there if name not in wanted)):
        if name in INFORMATIVE or there.get(name) == wanted.get(name):
            continue
        what = _WORDS.get(name) or f"{name} {there.get(name)}, not {wanted.get(name)}"
        if name == "prompt_digest":
            before, now = there.get("prompt"), wanted.get("prompt")
            what = f"other words of the prompt {now}" if before == now else f"the prompt {before}, not {now}"
        raise SettingsError(
            f"--out {out} holds summaries made with {what}: give the same to go on, or name another --out"
        )
