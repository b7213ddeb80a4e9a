"""Documents to summaries: one after the other, each kept when it is done.

Owns the order of the work and what makes a record. The engine is lent: while a job runs its context is the job's.
"""

import hashlib
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from duolocal import __version__
from duolocal.documents import Document, Skipped
from duolocal.engine.engine import Cancelled, Engine
from duolocal.errors import DocumentError, DuoLocalError, SummaryFileError
from duolocal.models.outer_weights import outer_formats
from duolocal.settings import SUMMARY_SAMPLING, Sampling
from duolocal.summarize.events import Began, Ended, Looked, Opened, Planned, Progress
from duolocal.summarize.frame import Frame, make_frame
from duolocal.summarize.inputs import Input, Summarizable, inputs_of, with_digests
from duolocal.summarize.output import Output
from duolocal.summarize.parts import part_key
from duolocal.summarize.plan import BETWEEN, Plan, group, make_plan, part_answer, part_limit
from duolocal.summarize.prompts import Prompt, make_prompt, whole_sentences
from duolocal.summarize.reader import Answer, Reader
from duolocal.summarize.records import Record, Timings
from duolocal.summarize.resume import INFORMATIVE, Standing, stand
from duolocal.tokenizer import Tokenizer

NEAR_EMPTY = 16  # tokens: a text of fewer is its own summary
Event = Looked | Began | Opened | Planned | Progress | Record | Ended


@dataclass
class _Tally:
    """What one input took so far."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    parts_cut: int = 0

    def add(self, answer: Answer) -> None:
        self.prompt_tokens += answer.prompt_tokens
        self.completion_tokens += answer.completion_tokens
        self.prefill_s += answer.prefill_s
        self.decode_s += answer.decode_s


@dataclass
class _Work:
    """One input on its way to a record."""

    item: Input
    began_s: float
    load_s: float = 0.0
    document: Document | None = None
    plan: Plan | None = None
    levels: int = 0
    tally: _Tally = field(default_factory=_Tally)


class Summarizer:
    """Summarises documents with one engine, one prompt and one set of settings."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        prompt: str | Prompt = "summary",
        length: str | None = None,
        sampling: Sampling = SUMMARY_SAMPLING,
        part_tokens: int | None = None,
        stop_repeats: bool = True,
        model: str = "",
    ) -> None:
        """Check the settings; nothing is computed.

        prompt: a preset, a prompt file or a Prompt; length: "short", "medium", "long" or "N words"; sampling: of every
        answer, `max_tokens` None for what the length allows, a seed of None is 0; part_tokens: the most of a document
        that is read at once, None for what fits; stop_repeats: end an answer where it goes round in circles; model: its
        name, for the records. Raises SettingsError and TokenizerError.
        """
        self.engine = engine
        self.prompt = prompt if isinstance(prompt, Prompt) else make_prompt(prompt, length=length)
        max_tokens = sampling.max_tokens or self.prompt.max_tokens
        self.sampling = replace(sampling, max_tokens=max_tokens, seed=sampling.seed or 0)
        self.frame: Frame = make_frame(tokenizer, self.prompt)
        self.limit = part_limit(self.frame, context=engine.context, max_tokens=max_tokens, wanted=part_tokens)
        self.part_sampling = replace(self.sampling, max_tokens=part_answer(self.limit, max_tokens))
        self.settings = self._settings(model, part_tokens, stop_repeats)
        self._stop_repeats = stop_repeats
        self._ends_whole = sampling.max_tokens is None  # the limit is ours, not one that was asked for
        self._reader = Reader(engine, self.frame)
        self._stopped = False

    def cancel(self) -> None:
        """End the job that is running, without a record of the input in hand; safe from a signal handler."""
        self._stopped = True
        self._reader.cancel()

    def plan(self, document: Document) -> Plan:
        """Return how a document would be read."""
        return make_plan(document, self.frame, limit=self.limit)

    def run(self, documents: Iterable[Summarizable], *, output: Output | None = None) -> Generator[Event, None, None]:
        """Summarise documents in order, yielding what is done and, when each ends, its Record; at last an Ended.

        documents: paths (folders, patterns and archives are expanded), Found files, or Documents. output: where records
        are kept, appended before they are yielded; what stands in it already is not done again. A failing input is a
        record with its error. Raises DuoLocalError where the job itself cannot go on: the inputs, the settings of the
        earlier run, or the disk.
        """
        self._reader = Reader(self.engine, self.frame)
        began_s = time.perf_counter()
        inputs: list[Input] = []
        ours = () if output is None else output.files
        given, skipped = inputs_of(documents, without=ours)
        for item in with_digests(given):
            inputs.append(item)
            yield Looked(len(inputs), len(given))
        standing = Standing({})
        if output is not None:
            standing = stand(output.records, inputs, self.settings, out=output.path)
            output.rewrite(standing.in_order())
        done, others = len(standing.done), len(standing.others)
        yield Began(len(inputs), done, standing.num_failed, standing.num_changed, others, skipped)
        made: list[Record] = []
        try:
            for event in self._each(inputs, standing.done, skipped, output):
                if isinstance(event, Record):
                    if output is not None:
                        output.append(event)
                    made.append(event)
                yield event
        finally:
            self._stopped = False  # at the end: a cancel before the first event counts, too
            self.engine.reset()
            if output is not None:
                output.rewrite(standing.in_order(output.records))
                output.finish(done=len(standing.done) + len(made) == len(inputs) + len(skipped))
        summarized = [record for record in (*standing.done.values(), *made) if record.error is None]
        failed = sum(record.error is not None and record.finish_reason != "skipped" for record in made)
        yield Ended(
            total=len(inputs),
            summarized=len(summarized),
            failed=failed,
            left=len(inputs) - len(summarized) - failed,
            cut_off=sum(record.cut_off for record in summarized),
            elapsed_s=time.perf_counter() - began_s,
        )

    # --- one after the other ---------------------------------------------------------------------------------------

    def _each(
        self, inputs: Sequence[Input], done: Mapping[int, Record], skipped: Sequence[Skipped], output: Output | None
    ) -> Iterator[Event]:
        """Do the inputs in turn until they end or the job is cancelled; at last note what was left out."""
        begun = False
        known = {record.digest: record for record in done.values() if record.digest is not None}
        left = [item for item in inputs if item.index not in done]
        for number, item in enumerate(left, start=1):
            if self._stopped:
                return
            yield Opened(item.index, item.name, number, len(left))
            work = _Work(item, time.perf_counter())
            if item.digest in known:
                yield self._copy(item, known[item.digest])
                continue
            try:
                if not begun:
                    self._reader.begin()
                    begun = True
                    work.began_s = time.perf_counter()  # the prompt is every document's
                for event in self._one(work, output):
                    if isinstance(event, Record) and event.digest is not None:
                        known[event.digest] = event
                    yield event
            except Cancelled:
                return
            except SummaryFileError:
                raise
            except DuoLocalError as error:
                yield self._record(work, None, error=str(error))
        for index, left_out in enumerate(() if self._stopped else skipped, start=len(inputs)):
            work = _Work(Input(index, left_out.name, left_out.name, left_out), time.perf_counter())
            yield replace(self._record(work, None, error=f"left out: {left_out.reason}"), finish_reason="skipped")

    def _copy(self, item: Input, first: Record) -> Record:
        """Return the record of an input whose bytes have been summarised."""
        note = f"the same bytes as {first.source}: its summary"
        return replace(
            first,
            **{name: getattr(item, name) for name in ("index", "name", "source", "occurrence")},
            prompt_tokens=0,
            completion_tokens=0,
            timings=Timings(),
            notes=(*first.notes, note),
            finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
            extra={},
        )

    def _one(self, work: _Work, output: Output | None) -> Iterator[Event]:
        """Read one input, yielding its Record at last."""
        work.document = document = work.item.load()
        if document.digest and document.digest != work.item.digest:
            work.item = replace(work.item, digest=document.digest)  # it was written to in between
        work.load_s = time.perf_counter() - work.began_s
        work.plan = plan = self.plan(document)
        yield Planned(work.item.index, work.item.name, plan.tokens, len(plan.pieces))
        if plan.tokens < NEAR_EMPTY:
            yield self._near_empty(work, plan)
            return
        texts = [plan.text[piece.start : piece.end].strip("\n") for piece in plan.pieces]
        answers: list[Answer] = []
        while True:
            sampling = self.sampling if len(texts) == 1 else self.part_sampling
            for part, text in enumerate(texts, start=1):
                key = part_key(self.settings_digest, sampling.max_tokens, text)
                kept = output.parts.get(key) if output is not None else None
                if kept is not None:
                    answers.append(kept)
                    work.tally.add(kept)
                    continue
                for event in self._reader.read(text, sampling, stop_repeats=self._stop_repeats):
                    if isinstance(event, Answer):
                        answers.append(event)
                        work.tally.add(event)
                        if output is not None and len(plan.pieces) > 1:
                            output.keep_part(key, event)
                    else:
                        place = (work.item.index, work.item.name, event.doing, part, len(texts), work.levels)
                        yield Progress(*place, event.done, event.total)
            if len(texts) == 1:
                break
            work.tally.parts_cut += sum(answer.finish_reason in ("length", "context") for answer in answers)
            said = [answer.text for answer in answers if answer.text]
            if not said:
                break
            texts = [BETWEEN.join(some) for some in group(said, self.frame, limit=self.limit)]
            answers = []
            work.levels += 1
        if not answers or not answers[-1].text:
            raise DocumentError(f"{work.item.source}: the model's answer is empty; try another --prompt or model")
        yield self._record(work, self._ended(answers[-1]))

    def _ended(self, answer: Answer) -> Answer:
        """Return an answer that our own limit cut off as far as it is whole."""
        if not self._ends_whole or answer.finish_reason != "length":
            return answer
        return replace(answer, text=whole_sentences(answer.text), finish_reason="sentence")

    def _near_empty(self, work: _Work, plan: Plan) -> Record:
        """Return the record of a document that says too little to be summarised: its text, marked as such."""
        note = f"near-empty, {plan.tokens} tokens: its text stands in place of a summary"
        record = self._record(work, None)
        return replace(record, summary=plan.text, finish_reason="near-empty", notes=(*record.notes, note))

    def _record(self, work: _Work, answer: Answer | None, *, error: str | None = None) -> Record:
        item, document, plan, tally = work.item, work.document, work.plan, work.tally
        total_s = time.perf_counter() - work.began_s
        times = (work.load_s or total_s, tally.prefill_s, tally.decode_s, total_s)
        return Record(
            index=item.index,
            name=item.name,
            source=item.source,
            digest=item.digest,
            occurrence=item.occurrence,
            kind=document.kind if document is not None else None,
            tokens=plan.tokens if plan is not None else None,
            parts=len(plan.pieces) if plan is not None else 0,
            levels=work.levels,
            summary=answer.text if answer is not None else None,
            finish_reason=answer.finish_reason if answer is not None else None,
            parts_cut=tally.parts_cut,
            prompt_tokens=tally.prompt_tokens,
            completion_tokens=tally.completion_tokens,
            timings=Timings(*(round(seconds, 4) for seconds in times)),
            notes=(*(document.notes if document is not None else ()), *(plan.notes if plan is not None else ())),
            error=error,
            settings=self.settings,
            settings_digest=self.settings_digest,
            finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
            version=__version__,
        )

    # --- settings --------------------------------------------------------------------------------------------------

    @property
    def settings_digest(self) -> str:
        """Return what tells the settings of records apart: 16 hex digits."""
        words = repr(sorted((name, value) for name, value in self.settings.items() if name not in INFORMATIVE))
        return hashlib.sha256(words.encode()).hexdigest()[:16]

    def _settings(self, model: str, part_tokens: int | None, stop_repeats: bool) -> Mapping[str, Any]:
        """Return all that a summary depends on, and what the model is called, as JSON has it."""
        engine, plan = self.engine, self.engine.plan
        source = engine.source
        sampling = asdict(self.sampling)
        rope = engine.config.rope_scaling
        heads = f"{plan.num_retrieval} of {plan.num_retrieval + plan.num_streaming}"
        return {
            "model": model,
            "fingerprint": "" if source is None else source.fingerprint,
            "weights": "" if source is None else source.weight_format,
            "outer_weights": [] if source is None else outer_formats(source),
            "tokenizer": self.frame.tokenizer.fingerprint,
            "heads": heads,
            "heads_digest": hashlib.sha256(repr(plan.retrieval).encode()).hexdigest()[:16],
            "heads_source": plan.source,
            "sink_size": plan.sink_size,
            "recent_size": plan.recent_size,
            "kv": engine.kv,
            "context": engine.context,
            "rope": rope.kind if rope.kind == "none" else f"{rope.kind}, factor {rope.factor:g}",
            "device": engine.transformer.device.type,
            "dtype": str(engine.transformer.dtype).removeprefix("torch."),
            "prompt": self.prompt.name,
            "length": self.prompt.length,
            "prompt_digest": self.prompt.digest,
            "part_tokens": part_tokens,
            "stop_repeats": stop_repeats,
            **sampling,
            "stop": list(self.sampling.stop),
        }


def summarize(
    documents: Iterable[Summarizable],
    engine: Engine,
    tokenizer: Tokenizer,
    *,
    out: Output | None = None,
    prompt: str | Prompt = "summary",
    length: str | None = None,
    sampling: Sampling = SUMMARY_SAMPLING,
    part_tokens: int | None = None,
    stop_repeats: bool = True,
    model: str = "",
) -> Iterator[Record]:
    """Yield a Record per document that is not done in `out` yet: a Summarizer's run without the progress.

    The arguments are those of Summarizer and of its `run`. Raises DuoLocalError.
    """
    summarizer = Summarizer(
        engine,
        tokenizer,
        prompt=prompt,
        length=length,
        sampling=sampling,
        part_tokens=part_tokens,
        stop_repeats=stop_repeats,
        model=model,
    )
    for event in summarizer.run(documents, output=out):
        if isinstance(event, Record):
            yield event
