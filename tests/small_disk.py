"""A real disk that is too small: a tmpfs that only the process of the test sees (Linux, where users may mount one)."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import duolocal

ROOT = Path(duolocal.__file__).parents[1]


def run_on_small_disk(folder: Path, size: str, code: str, **environment: str) -> list[str]:
    """Run Python code that has `folder` on a disk of `size`, such as "3m"; return the lines it prints.

    In the code `grow("9m")` makes the disk larger. Skips the test where nothing can be mounted.
    """
    folder.mkdir()
    mounted = f'mount -t tmpfs -o size={size} tmpfs {folder} && exec "$@"'
    words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mounted, "sh"]
    try:
        able = subprocess.run([*words, "true"], capture_output=True).returncode == 0
    except OSError:
        able = False
    if not able:
        pytest.skip("this system lets nobody mount a small disk")
    grow = f"""
        import subprocess
        def grow(size):
            subprocess.run(["mount", "-o", "remount,size=" + size, {str(folder)!r}], check=True)
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"PYTHONPATH": str(ROOT), **environment}
    program = textwrap.dedent(grow) + textwrap.dedent(code)
    done = subprocess.run([*words, sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
