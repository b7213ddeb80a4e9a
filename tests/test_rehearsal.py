"""The rehearsal of the headline job (scripts/rehearse.py) at its reduced size: processes of its own, no network."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from duolocal.quant.kv import DEFAULT_BLOCK_SIZE

SCRIPT = Path(__file__).parents[1] / "scripts" / "rehearse.py"


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process in /proc (Linux)")
def test_the_headline_job_is_fetched_planned_answered_saved_and_reopened(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--size", "small", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["context"], found["kv"]) == (64 * 1024, "int4")
    assert found["retrieval_heads"] == 128  # half of them: the published pattern came with the model
    assert 0 < found["blocks_in_memory"] * DEFAULT_BLOCK_SIZE < found["prompt_tokens"]  # others are read from the file
    assert found["reopened_prompt_tokens"] < 100 < found["prompt_tokens"] < found["reopened_context_tokens"]
    assert "nothing to read" in done.stderr
    assert 0.95 <= found["expected_over_peak"] <= 1.05, found
    assert 0.95 <= found["reopened_expected_over_peak"] <= 1.05, found
    assert list(tmp_path.iterdir()) == []
