"""Show that a batch of summaries survives kill -9: make documents, summarise, kill, resume, and judge what is there.

python scripts/show_summarize.py --documents 200 --kills 20            (an hour on two cores; --work keeps all of it)

The documents are generated and real ones (this repository's, Python's own help, licences), in text, Markdown, HTML,
CSV, JSON, code, PDF, DOCX, EPUB, XLSX and a zip archive; three are broken, two larger than the context, two the same.
The command is killed at random moments, also while it starts, and given again until it ends. Then every input has to
have one valid record, in order, and no summary may ever have been made anew: after every kill all finished records are
compared with those before, to the byte.
"""

import argparse
import json
import pydoc_data.topics
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from duolocal.documents import gather  # noqa: E402
from duolocal.models.loader import open_model  # noqa: E402
from duolocal.models.registry import resolve  # noqa: E402
from duolocal.summarize.records import Record, parse_line  # noqa: E402
from duolocal.tokenizer import Tokenizer, load_tokenizer  # noqa: E402
from tests import document_files as files  # noqa: E402

PLACES = ("Harbour", "Mill Street", "Old Town", "North Quay", "Vara", "Lund", "Riverside", "Hill Farm", "Eastgate")
THINGS = ("library", "ferry", "school", "bakery", "clinic", "market", "water works", "museum", "bus depot", "theatre")
PEOPLE = ("Ms Okafor", "Mr Lind", "Dr Sato", "Ms Dahl", "Mr Maren", "Ms Ortega", "Mr Kowalski", "Dr Rossi")
SENTENCES = (
    "In {month} the {thing} of {place} served {n} people, {p}% more than in the year before.",
    "{person} told the board that the roof needs repairs for {n} euros before the winter.",
    "The board decided on {day} {month} to buy {k} new machines from a firm in {other}.",
    "{person} left after {k} years; {person2} will take over in {month}.",
    "Two visitors complained about the heating, which was repaired within {k} days.",
    "Income rose to {n} euros, of which {p}% came from the town.",
    "The fire inspection found {k} faults; all but one have been put right.",
    "A vote on longer opening hours was put off until {month} because {person} was ill.",
    "The contract with the cleaning firm ends on {day} {month} and will not be renewed.",
)
MONTHS = ("January", "March", "April", "June", "August", "September", "November")
KINDS = ("txt", "md", "html", "csv", "json", "pdf", "docx", "epub", "xlsx", "topic", "code", "zip")
DONE = re.compile(r"^duolocal: [\d,]+ of [\d,]+ (.+?): [\d,]+ tokens?\b")


def say(text: str) -> None:
    print(text, flush=True)


# --- documents -------------------------------------------------------------------------------------------------------


def report(chance: random.Random, sentences: int) -> tuple[str, list[str]]:
    """Return the title and the paragraphs of a made-up report."""
    place, thing = chance.choice(PLACES), chance.choice(THINGS)

    def sentence() -> str:
        words = {"place": place, "thing": thing, "other": chance.choice(PLACES), "month": chance.choice(MONTHS)}
        words |= {
            "person": chance.choice(PEOPLE),
            "person2": chance.choice(PEOPLE),
            "n": f"{chance.randrange(900000):,}",
        }
        words |= {
            "p": str(chance.randrange(2, 60)),
            "k": str(chance.randrange(2, 30)),
            "day": str(chance.randrange(1, 29)),
        }
        return chance.choice(SENTENCES).format(**words)

    said = [sentence() for _ in range(sentences)]
    return f"Report on the {thing} of {place}", [" ".join(said[at : at + 4]) for at in range(0, sentences, 4)]


def write(folder: Path, stem: str, kind: str, chance: random.Random) -> None:
    """Write one document of about 150 to 600 tokens."""
    title, paragraphs = report(chance, chance.randrange(6, 20))
    text = "\n\n".join([title, *paragraphs]) + "\n"
    lines = re.sub(r"(.{60}\S*) ", r"\1\n", text)
    content: str | bytes = text
    ending = kind
    if kind == "md":
        content = f"# {title}\n\n" + "\n\n".join(f"## Part {at}\n\n{p}" for at, p in enumerate(paragraphs, 1))
    elif kind == "html":
        content = f"<html><body><h1>{title}</h1>" + "".join(f"<p>{p}</p>" for p in paragraphs) + "</body></html>"
    elif kind == "csv":
        rows = [f"{chance.choice(MONTHS)},{chance.choice(PLACES)},{chance.randrange(9000)}" for _ in range(20)]
        content = "month,place,visitors\n" + "\n".join(rows) + "\n"
    elif kind == "json":
        content = json.dumps({"title": title, "paragraphs": paragraphs}, indent=1)
    elif kind == "pdf":
        half = lines[: len(lines) // 2].rpartition("\n")[0]
        content = files.pdf([half, lines[len(half) :].strip()])
    elif kind == "docx":
        content = files.docx("".join(files.paragraph(p) for p in [title, *paragraphs]))
    elif kind == "epub":
        chapters = {f"c{at}.xhtml": f"<h1>Chapter {at}</h1><p>{p}</p>" for at, p in enumerate(paragraphs, 1)}
        content = files.epub(chapters)
    elif kind == "xlsx":
        content = files.xlsx({"Visitors": [[chance.choice(PLACES), chance.choice(MONTHS)] for _ in range(15)]})
    elif kind == "topic":
        topics = sorted(name for name, text in pydoc_data.topics.topics.items() if 600 < len(text) < 4000)
        content, ending = pydoc_data.topics.topics[chance.choice(topics)], "rst"
    elif kind == "code":
        sources = sorted(path for path in (ROOT / "duolocal").glob("*/*.py") if 800 < path.stat().st_size < 4000)
        content, ending = chance.choice(sources).read_bytes(), "py"
    elif kind == "zip":
        content = files.zipped({f"{stem}-{at}.txt": "\n\n".join(report(chance, 8)[1]) for at in range(2)})
    path = folder / f"{stem}.{ending}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def make_documents(folder: Path, count: int, *, context: int, tokenizer: Tokenizer, seed: int) -> list[str | Path]:
    """Write documents that come to `count` inputs; return what to name on the command line."""
    chance = random.Random(seed)
    for at in range(3):
        cut = [files.pdf(["one page"]), files.docx(files.paragraph("cut")), files.epub({"c.xhtml": "<p>cut</p>"})][at]
        (folder / f"broken-{at}.{('pdf', 'docx', 'epub')[at]}").write_bytes(cut[: len(cut) // 2 - 40])
    for at in range(2):
        text = ""
        while len(tokenizer.encode(text)) < 1.3 * context:
            text += "\n\n".join(report(chance, 60)[1]) + "\n\n"
        (folder / f"long-{at}.txt").write_text(text)
    for at in range(2):
        (folder / f"same-{at}.txt").write_text("\n\n".join(report(random.Random(0), 8)[1]))
    real = [ROOT / "LICENSE", *sorted((ROOT / "docs").glob("*.md"))][: count // 20]
    made = 7 + len(real)
    while made < count:
        kind = KINDS[made % len(KINDS)] if count - made > 1 else "txt"
        write(folder, f"doc-{made:03d}", kind, chance)
        made += 2 if kind == "zip" else 1
    return [folder, *sorted(folder.glob("*.zip")), *real]


# --- killing ---------------------------------------------------------------------------------------------------------


def records(path: Path) -> tuple[dict[tuple[str | None, int], Record], int]:
    """Return the finished records by document and occurrence, and how many bytes of a torn line follow them."""
    data = path.read_bytes() if path.exists() else b""
    whole, _, torn = data.rpartition(b"\n")
    found = {}
    for line in whole.split(b"\n") if whole else []:
        record = parse_line(line)
        if record is None:
            raise SystemExit(f"FAIL: {path} has a line in its middle that is no record")
        if record.error is None:
            key = (record.digest, record.occurrence)
            if key in found:
                raise SystemExit(f"FAIL: {path} holds {record.name} twice")
            found[key] = record
    return found, len(torn)


def finished(log: Path) -> int:
    return sum(1 for line in log.read_text(errors="replace").splitlines() if DONE.match(line)) if log.exists() else 0


def kill_and_resume(command: list[str], out: Path, log: Path, *, count: int, kills: int, seed: int) -> list[str]:
    """Run the command, killing it at random moments until that was done `kills` times; return what went wrong."""
    chance = random.Random(seed + 1)
    wrong: list[str] = []
    kept: dict[tuple[str | None, int], Record] = {}
    killed = torn_lines = 0
    while True:
        with log.open("a") as stderr:
            child = subprocess.Popen(command, cwd=ROOT, stderr=stderr)
        if killed < kills:
            # One in four dies while it starts or soon after, the others after some documents and then a moment more.
            after = 0 if chance.random() < 0.25 else chance.randint(1, max(1, round(1.6 * count / (kills + 1))))
            goal = finished(log) + after
            while child.poll() is None and finished(log) < goal:
                time.sleep(0.05)
            until_s = time.monotonic() + chance.uniform(0.0, 6.0 if not after else 4.0)
            while child.poll() is None and time.monotonic() < until_s:
                time.sleep(0.01)
            if child.poll() is None:
                child.send_signal(signal.SIGKILL)
        code = child.wait()
        now, torn = records(out)
        wrong += [f"{record.name} was finished and is gone" for key, record in kept.items() if key not in now]
        again = [key for key, record in kept.items() if key in now and now[key] != record]
        wrong += [f"{kept[key].name} was finished and was done anew" for key in again]
        kept = now
        torn_lines += torn > 0
        if code == -signal.SIGKILL:
            killed += 1
            say(f"killed {killed} of {kills}: {len(now)} of {count} finished{', the last line torn' if torn else ''}")
            continue
        if code not in (0, 3):
            wrong.append(f"the command ended with code {code}")
        if killed < kills:
            wrong.append(f"it was done after {killed} kills of {kills}")
        say(f"ended with code {code} after {killed} kills, {torn_lines} of them in the middle of a line")
        return wrong


def judge(out: Path, names: list[str], log: Path) -> list[str]:
    """Return what is wrong with the file."""
    found = [parse_line(line) for line in out.read_bytes().splitlines()]
    wrong = [f"line {at} is no record" for at, record in enumerate(found, 1) if record is None]
    valid = [record for record in found if record is not None]
    if [record.name for record in valid] != names:
        missing = sorted(Counter(names) - Counter(record.name for record in valid))
        wrong.append(f"{len(valid)} records for {len(names)} inputs, not one each in order; missing: {missing[:5]}")
    if [record.index for record in valid] != list(range(len(names))):
        wrong.append("the records are not numbered as the inputs")
    failed = [record.name for record in valid if record.error is not None]
    if sorted(Path(name).stem for name in failed) != ["broken-0", "broken-1", "broken-2"]:
        wrong.append(f"failed are {failed}, not the three broken ones")
    long = {Path(record.name).stem: record for record in valid if "long-" in record.name}
    if len(long) != 2 or any(record.parts < 2 or record.levels < 1 for record in long.values()):
        wrong.append("the two long ones were not read in parts and merged")
    if sorted(record.occurrence for record in valid if "same-" in record.name) != [0, 1]:
        wrong.append("the two of the same bytes are not told apart")
    done = Counter(match[1] for line in log.read_text(errors="replace").splitlines() if (match := DONE.match(line)))
    twice = [name for name, times in done.items() if times > 1 and name not in failed]
    if twice:
        wrong.append(f"said to be finished more than once: {twice[:5]}")
    kinds = Counter(record.kind for record in valid)
    say("records by kind: " + ", ".join(f"{kind or 'unread'} {count}" for kind, count in kinds.most_common()))
    say(
        "ended by: "
        + ", ".join(f"{reason} {count}" for reason, count in Counter(r.finish_reason for r in valid).items())
    )
    seconds = sum(record.timings.total_s for record in valid)
    size = sum(record.tokens or 0 for record in valid)
    tokens = sum(record.prompt_tokens + record.completion_tokens for record in valid)
    say(f"{size:,} tokens of documents, {tokens:,} read and written, {seconds:.0f} s")
    for record in list(long.values())[:1]:
        say(f"{record.name}: {record.tokens:,} tokens in {record.parts} parts, {record.levels} level of merging")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--length", default="short")
    parser.add_argument("--work", type=Path, help="where to put documents and summaries (default: a folder that goes)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        folder, out, log = work / "documents", work / "summaries.jsonl", work / "stderr.log"
        folder.mkdir(parents=True)
        tokenizer = load_tokenizer(open_model(resolve(options.model)))
        given = make_documents(
            folder, options.documents, context=options.context, tokenizer=tokenizer, seed=options.seed
        )
        names = [found.name for found in gather(given).found]
        say(f"{len(names)} inputs made; context {options.context:,}, {options.kills} kills, seed {options.seed}")
        program = "import sys; from duolocal.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", program, "summarize", *map(str, given), "--out", str(out), "--resume"]
        command += ["--model", options.model, "--context", str(options.context), "--length", options.length]
        began_s = time.monotonic()
        wrong = kill_and_resume(command, out, log, count=len(names), kills=options.kills, seed=options.seed)
        say(f"took {(time.monotonic() - began_s) / 60:.1f} min")
        if len(names) != options.documents:
            wrong.append(f"{len(names)} inputs were made, not {options.documents}")
        wrong += judge(out, names, log)
        for item in wrong:
            say(f"WRONG: {item}")
        say("FAIL" if wrong else f"PASS: {len(names)} inputs, one valid record each, no finished summary made anew")
        return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
