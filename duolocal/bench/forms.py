"""One model in several forms on disk, made by the commands that people would use, each in a process of its own."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from duolocal.bench.child import child_environment
from duolocal.errors import DuoLocalError

FORMS = ("f16", "awq", "native")


def form_command(form: str, model: str | Path, out: Path, *, device: str = "auto") -> list[str]:
    """Return the words after `duolocal` that write `model` to `out` as one of FORMS.

    awq is plain rounding (rtn): how long a file takes to load does not depend on how good its values are.
    """
    if form == "awq":
        return ["quantize", "--model", str(model), "--out", str(out), "--method", "rtn"]
    assert form in FORMS
    words = ["models", "convert", "--model", str(model), "--out", str(out), "--to", form]
    return words + (["--device", device] if form == "native" else [])


def make_form(form: str, model: str | Path, out: Path, *, device: str = "auto", threads: int | None = None) -> Path:
    """Write `model` to `out` as one of FORMS and return `out`. Raises DuoLocalError with the command's own line."""
    command = [sys.executable, "-m", "duolocal", *form_command(form, model, out, device=device)]
    done = subprocess.run(command, env=child_environment(threads), capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        raise DuoLocalError(f"{form} cannot be made of {model}: {lines[-1].removeprefix('duolocal: ')[:400]}")
    return out


def disk_bytes(path: Path) -> int:
    """Return the bytes of a model's weights on disk: of a file, or of the safetensors and GGUF files of a folder."""
    files: Sequence[Path] = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*.gguf")]
    return sum(file.stat().st_size for file in files)
