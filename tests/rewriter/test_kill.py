"""`apply` killed at any moment leaves no output folder, and the same command then succeeds."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

import rewriter

PLAN = "version: 1\nsteps:\n  - pass: sliding_window\n    window: 8\n    sinks: 2\n"


@pytest.mark.slow
def test_killed_apply_leaves_nothing(tiny_llama, tmp_path: Path):
    tiny_llama.save_pretrained(tmp_path / "model")
    (tmp_path / "plan.yaml").write_text(PLAN)
    command = [sys.executable, "-c", "from rewriter.cli import main; main()", "apply"]
    command += [str(tmp_path / "model"), "--plan", str(tmp_path / "plan.yaml")]
    output = tmp_path / "out"
    command += ["--output", str(output)]

    start = time.perf_counter()
    subprocess.run([*command[:-1], str(tmp_path / "first")], check=True, capture_output=True)
    duration = time.perf_counter() - start
    moments = random.Random(0)
    for _ in range(20):
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(duration * moments.uniform(0.5, 1.0))
        running.kill()
        running.wait()
        if output.exists():  # it was quicker: then it is whole
            rewriter.load(output)
            output.rename(tmp_path / f"done-{time.time_ns()}")
    assert not output.exists()
    subprocess.run(command, check=True, capture_output=True)
    rewriter.load(output)
    assert not list(tmp_path.glob(".out.*"))  # nor what the killed runs left beside it
