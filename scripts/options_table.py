"""Write the table of options in README.md from where they are declared; with --check, fail where it is another.

python scripts/options_table.py [--check]
"""

import sys
from dataclasses import fields
from pathlib import Path

from duolocal.options import declared_in, default_text, flag
from duolocal.settings import LoadSettings

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- written by scripts/options_table.py -->\n", "<!-- end -->\n"


def table(owner: type) -> str:
    """Return the options of a dataclass as a table."""
    lines = ["| option | meaning | default |", "| --- | --- | --- |"]
    for item in fields(owner):
        declared = declared_in(item)
        default = default_text(item, item.default)
        lines.append(f"| `{flag(item.name)} {declared.metavar}` | {declared.help} | {default} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Return 1 where the table was another, else 0."""
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    written = before + BEGIN + table(LoadSettings) + END + rest.partition(END)[2]
    if "--check" not in sys.argv:
        README.write_text(written, encoding="utf-8")
        return 0
    if written != text:
        print(f"{README.name}: the table of options is not what is declared: python {Path(__file__).name}")
    return int(written != text)


if __name__ == "__main__":
    sys.exit(main())
