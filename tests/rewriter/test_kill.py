"""`apply` killed at any moment leaves no output folder, and the same command then succeeds."""

from __future__ import annotations

import multiprocessing
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

import rewriter
from rewriter.cli import run

PLAN = "version: 1\nsteps:\n  - pass: sliding_window\n    window: 8\n    sinks: 2\n"


@pytest.mark.slow
def test_killed_apply_leaves_nothing(tiny_llama, tmp_path: Path):
    tiny_llama.save_pretrained(tmp_path / "model")
    (tmp_path / "plan.yaml").write_text(PLAN)
    output = tmp_path / "out"
    arguments = ["apply", str(tmp_path / "model"), "--plan", str(tmp_path / "plan.yaml")]
    # The server has imported everything, so that every kill falls into the work itself.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rewriter.cli", "rewriter.rewrite", "rewriter.model"])

    def start(folder: Path) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=run, args=([*arguments, "--output", str(folder)],))
        process.start()
        return process

    for name in ("warm", "first"):  # the first one waits for the server's imports
        begin = time.perf_counter()
        start(tmp_path / name).join()
        duration = time.perf_counter() - begin
        rewriter.load(tmp_path / name)
    moments, killed = random.Random(0), 0
    for _ in range(20):
        running = start(output)
        time.sleep(duration * moments.uniform(0.0, 1.0))
        running.kill()
        running.join()
        if output.exists():  # it was quicker: then it is whole
            rewriter.load(output)
            output.rename(tmp_path / f"done-{time.time_ns()}")
        else:
            killed += 1
    assert killed >= 10
    command = [sys.executable, "-c", "from rewriter.cli import main; main()", *arguments]
    subprocess.run([*command, "--output", str(output)], check=True, capture_output=True)
    rewriter.load(output)
    assert not list(tmp_path.glob(".out.*"))  # nor what the killed runs left beside it
