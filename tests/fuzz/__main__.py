"""`python -m tests.fuzz`: see the package."""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.fuzz.run import Tally, run_target, total
from tests.fuzz.targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz the readers of model files.")
    parser.add_argument("--count", type=int, default=1000, help="files of each target (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first file (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other files (default: %(default)s)")
    parser.add_argument("--target", nargs="+", choices=sorted(TARGETS), default=list(TARGETS), help="default: all")
    keep = Path(tempfile.gettempdir()) / "duolocal-fuzz"
    parser.add_argument(
        "--keep", type=Path, default=keep, help="where files that failed are put (default: %(default)s)"
    )
    parser.add_argument("--kinds", type=int, default=0, help="show so many kinds of refusal (default: %(default)s)")
    options = parser.parse_args()
    from tests.fuzz.seeds import make_seeds

    tallies: list[Tally] = []
    with tempfile.TemporaryDirectory(prefix="duolocal-fuzz-") as folder:
        work = Path(folder)
        seeds = make_seeds(work / "seeds")
        for name in options.target:
            tally = run_target(
                name,
                seeds,
                work,
                count=options.count,
                seed=options.seed,
                first=options.first,
                keep=options.keep,
                on_file=_progress(name),
            )
            tallies.append(tally)
            for failure in tally.failures[:20]:
                print(f"  {failure}")
            print(tally.line(), flush=True)
            for kind, count in tally.kinds.most_common(options.kinds):
                print(f"    {count:6,} {kind}")
    everything = total(tallies)
    print(everything.line())
    if everything.failures:
        print(f"the files that failed are in {options.keep}")
    return 1 if everything.failures else 0


def _progress(name: str):
    if not sys.stderr.isatty():
        return lambda done, count: None
    return lambda done, count: print(f"\r{name}: {done:,} of {count:,}", end="\r", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
