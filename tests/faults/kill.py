"""Kill every long job at random moments, start it again until it ends, and compare with a run left alone.

    python -m tests.faults.kill --times 50

After each kill and at the end, every file that has its final name must be what the undisturbed run wrote: bit for bit,
but for likelihoods, which differ by rounding when other pairs share a batch.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.faults.jobs import Job, make_jobs, start_runs
from tests.workers.forked import Runs, Strike


@dataclass
class Tally:
    """What happened: kills that hit, runs that ended before theirs, results compared."""

    kills: int = 0
    escapes: int = 0
    results: int = 0


def run_killed(runs: Runs, job: Job, folder: Path, times: int, rng: random.Random) -> Tally:
    """Kill a job `times` times, in as many results as it takes.

    Args:
        runs: starts processes.
        job: the job.
        folder: for its outputs.
        times: kills.
        rng: chooses the moments.

    Raises:
        AssertionError: something half-written looks whole, a result differs, or a run fails.
    """
    whole, out = folder / "whole", folder / "out"
    started = time.monotonic()
    codes, output = runs(job.script, job.command(whole), constants=job.constants)
    assert codes == [0], output
    seconds = time.monotonic() - started
    tally = Tally()
    restart = False
    while tally.kills < times or restart:
        due = tally.kills < times
        strike = Strike(after=rng.uniform(0, seconds)) if due else None
        flags = job.command(out, *(job.restart if restart else ()))
        codes, output = runs(job.script, flags, strike=strike, constants=job.constants)
        assert codes == [0] or (due and codes == [-9]), output
        ended = codes == [0]
        job.check(whole, out, ended)
        restart = not ended
        if ended:
            tally.escapes += due
            tally.results += 1
            shutil.rmtree(out)
        else:
            tally.kills += 1
    return tally


def main() -> None:
    """Kill all jobs in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=50, help="kills, shared out over the jobs")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    runs = start_runs()
    with tempfile.TemporaryDirectory() as name:
        jobs = make_jobs(Path(name))
        for number, job in enumerate(jobs.values()):
            own = args.times * (number + 1) // len(jobs) - args.times * number // len(jobs)
            started = time.monotonic()
            tally = run_killed(runs, job, Path(name) / job.name, own, random.Random(args.seed + number))
            seconds = time.monotonic() - started
            print(
                f"{job.name}: {tally.kills} kills, {tally.escapes} runs that ended before theirs, {tally.results} "
                f"results as undisturbed, {seconds:.0f} s",
                flush=True,
            )
    runs.close()


if __name__ == "__main__":
    main()
