import contextlib
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

import pytest
from support.processes import launched
from support.rows import rows_of

from more_hf.cli.main import main
from more_hf.data import EMOJI_ARTISTS


HEADER = "case_number,prompt,evaluation_seed,artist,thing,group\n"
THINGS = ("crab", "rocket", "pizza", "bell")
PROMPTS = HEADER + "".join(
    f"{10 * i + j},a {thing} in the style of {artist},{1000 * i + 7 * j},{artist},{thing},one\n"
    for i, artist in enumerate(("Blobmoji", "Noto", "High Contrast"))
    for j, thing in enumerate(THINGS)
)
ROWS = 12 + 4  # the forgotten artist has a second seed
HEAVY = ["more_hf.cli", "more_hf_bench.artists.run", "transformers.models.clip.modeling_clip", "lpips"]
HEAVY += ["diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"]


@pytest.fixture
def bench(tmp_path):
    """The arguments of a small benchmark of the embedded pipeline, for an output folder and a batch size."""
    (tmp_path / "few.csv").write_text(PROMPTS)
    (tmp_path / "few.toml").write_text('seeds = 2\nsteps = 5\n[settings]\nrouter = "random"\n')

    def argv(output, batch_size):
        words = "bench artists --methods original,more --forget Blobmoji --remap_to Noto Fluent"
        words += f" --steps 3 --batch_size {batch_size} --config {tmp_path / 'few.toml'}"
        return [*words.split(), "--prompts", str(tmp_path / "few.csv"), "--output", str(output)]

    return argv


def run_command(argv, log, variables):
    """The whole life of a process: its environment as a launcher sets it, the command, its exit status."""
    # One OpenMP thread, before accelerate sets more: a pool of threads does not survive the server's fork.
    os.environ.update({"OMP_NUM_THREADS": "1", **variables})
    import torch

    torch.set_num_threads(1)
    with open(log, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        status = main(argv)
    sys.exit(status)


@pytest.fixture(scope="module")
def start():
    """Start a command in a process of its own, from a server that has imported the libraries once."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(HEAVY)
    patch = pytest.MonkeyPatch()
    patch.setenv("OMP_NUM_THREADS", "1")  # for the server, which starts with the first process

    def start_process(argv, log, **variables):
        process = server.Process(target=run_command, args=(argv, log, variables))
        process.start()
        return process

    yield start_process
    patch.undo()


def done(output: Path) -> dict[Path, int]:
    """When each picture that counts was written."""
    pictures = [path.with_suffix(".png") for path in output.glob("images/*/[0-9]*.json")]
    return {path: path.stat().st_mtime_ns for path in pictures}


def kill_at(output: Path, count: int, process, log) -> dict[Path, int]:
    deadline = time.monotonic() + 240
    while len(done(output)) < count:
        assert process.is_alive(), log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    return done(output)


@pytest.mark.slow
def test_killed_twice_then_two_processes(bench, start, tmp_path, capsys):
    output, whole, log = tmp_path / "killed", tmp_path / "whole", tmp_path / "log"
    first = kill_at(output, 3, start(bench(output, 1), log), log)  # among the pictures before
    assert 3 <= len(first) < ROWS
    second = kill_at(output, ROWS + 3, start(bench(output, 2), log), log)  # among those after
    assert ROWS + 3 <= len(second) < 2 * ROWS
    assert first.items() <= second.items()

    logs = [tmp_path / f"log{rank}" for rank in range(2)]
    processes = [
        start(bench(output, 3), log, **environment)
        for log, environment in zip(logs, launched(2), strict=True)
    ]
    for process, text in zip(processes, logs, strict=True):
        process.join(240)
        assert process.exitcode == 0, text.read_text()
    assert [text.read_text().count("| more") for text in logs] == [1, 0]  # one process prints
    assert [text.read_text().count("Running in 2 processes on cpu.") for text in logs] == [1, 0]
    assert [run["processes"] for run in json.loads((output / "config.json").read_text())["runs"]] == [1, 1, 2]
    last = done(output)
    assert second.items() <= last.items()
    assert len(last) == 2 * ROWS

    assert main(bench(whole, 16)) == 0
    assert "style_f" in capsys.readouterr().out
    rows, wanted = rows_of(output), rows_of(whole)
    assert len(rows) == 2 * ROWS
    exact = (
        "method forget remap_to case_number sample evaluation_seed artist thing prompt before after".split()
    )
    for row, want in zip(rows, wanted, strict=True):
        assert all(getattr(row, key) == getattr(want, key) for key in exact)
        assert row.lpips == pytest.approx(want.lpips, abs=1e-3)
        assert row.style_after in EMOJI_ARTISTS
        assert row.content_after in (0, 1)
    assert any(row.lpips > 0.05 for row in rows)

    table = (output / "table.md").read_text()
    assert main(["bench", "report", str(output)]) == 0
    assert (output / "table.md").read_text() == table


def test_a_report_needs_a_benchmark(tmp_path, capsys):
    assert main(["bench", "report", str(tmp_path)]) == 2
    assert "no config.json" in capsys.readouterr().err
