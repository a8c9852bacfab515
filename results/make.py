"""results/make.py - the tables of what selectors answer and keep, from nothing but the checkpoints.

    python results/make.py            about six hours on 2 cores; goes on when interrupted
    python results/make.py --quick    with few documents, in minutes, into out/quick/

Each step is a command of its own, shown as it starts, on one core; as many run side by side as
there are cores. What a step says goes to out/tables/STEP.log, its last line to results/STEP.json. A
step whose file is in out/tables already, by the same command and younger than the checkpoints, is
not run again, and single scores of synth_task.py are kept as they come. When all are there the
files go to results/ and the tables are rewritten.
The encyclopedia articles that some measure on are written once by results/prose.py.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from common.cli import flag, known, names, run
from common.errors import UsageError

TEXT = "out/prose.txt"
RIVALS = "dense,oracle,butler,quest,h2o,snapkv,recency,random,keynorm"
NEAR = "dense,oracle,butler"
NEEDLES = "needle_noise,needle_prose,needle_uuid,multikey"

# step: (command, n of the full run, n of the quick run); the longest first
STEPS = {
    "ruler_8000": ("synth_task.py --task needle_noise,needle_prose,multikey --context 8000 "
                   f"--selectors {NEAR} --budgets 0.05,0.1 --batch 2", 40, 0),
    "ruler_4096": (f"synth_task.py --task {NEEDLES} --context 4096 --selectors {NEAR} "
                   "--budgets 0.05,0.1", 40, 0),
    "drift": ("bench.py --suite drift --task coreference,needle_prose,copy --contexts 1024,4096 "
              "--selectors dense,butler --drifts 0,0.2,0.25,0.4,2", 20, 1),
    "ruler": (f"synth_task.py --task {NEEDLES},copy --context 1024,2048 --selectors {NEAR} "
              "--budgets 0.05,0.1", 40, 1),
    "ruler_rivals": ("synth_task.py --task needle_noise,needle_prose --context 2048 --selectors "
                     "dense,quest,h2o,snapkv,recency,random,keynorm --budgets 0.1,0.25", 20, 0),
    "length": (f"bench.py --suite length --text {TEXT} --contexts 512,1024,2048,4096,8000 "
               "--selectors dense,oracle,butler,recency", 20, 0),
    "length_25": (f"bench.py --suite length --text {TEXT} --contexts 512,1024,2048,4096 "
                  "--selectors dense,oracle,butler,recency --budgets 0.25", 20, 0),
    "coreference": (f"synth_task.py --selectors {NEAR} --budgets 0.07,0.1 --batch 8", 200, 6),
    "budgets": (f"synth_task.py --selectors {RIVALS} --budgets 0.07,0.1,0.25,0.5 --batch 8", 60, 0),
    "perplexity": (f"bench.py --suite perplexity --text {TEXT} --budgets 0.1,0.25,0.5 "
                   "--selectors dense,oracle,butler,quest,recency", 24, 1),
    "recall": (f"bench.py --suite recall --text {TEXT} "
               "--selectors oracle,butler,quest,recency,random,keynorm", 20, 1),
    "generation": (f"bench.py --suite generation --selectors dense,butler --length 2048 "
                   f"--text {TEXT}", 20, 0),
    "referents_2": (f"synth_task.py --referents 2 --selectors {NEAR} --batch 8", 100, 4),
    "coreference_prefill": (f"synth_task.py --question prefill --selectors {RIVALS} --batch 8",
                            60, 0),
}


@dataclass
class Config:
    """Measures every step's table and rewrites those of the two READMEs."""

    only: tuple = flag((), f"comma-separated steps, of {', '.join(STEPS)} (default: all)", names)
    quick: bool = flag(False, "few documents, nothing written to results/")


def main(config: Config) -> dict:
    known("step", config.only, STEPS)
    if not (ROOT / TEXT).exists() and any(TEXT in STEPS[s][0] for s in config.only or STEPS):
        raise UsageError(f"no file {TEXT}: python results/prose.py writes it")
    out, began = ROOT / "out" / ("quick" if config.quick else "tables"), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    steps = [s for s in config.only or STEPS if STEPS[s][1 + config.quick]]
    with ThreadPoolExecutor(torch.get_num_threads()) as cores:
        seconds = dict(zip(steps, cores.map(lambda s: step(s, out, config.quick), steps),
                           strict=True))
    if not config.quick:
        for name in steps:
            shutil.copy(out / f"{name}.json", ROOT / "results")
        subprocess.run([sys.executable, str(ROOT / "results" / "render.py")], check=True)
    return {"seconds": round(time.monotonic() - began), "steps": seconds}


def step(name: str, out: Path, quick: bool) -> int:
    """Runs one step on one core, if its result is not there yet. -> seconds"""
    began, done = time.monotonic(), out / f"{name}.json"
    command = f"{STEPS[name][0]} --n {STEPS[name][1 + quick]}"
    if command.startswith("synth_task.py"):
        command += f" --out {out.relative_to(ROOT)}/{name}.jsonl"
    trained = max(path.stat().st_mtime for path in (ROOT / "checkpoints").iterdir())
    for old in (done, out / f"{name}.jsonl"):
        if old.exists() and old.stat().st_mtime < trained:
            old.unlink()  # of other butlers
    if done.exists() and json.loads(done.read_text())["command"] == f"python {command}":
        return 0
    print("python", command, file=sys.stderr, flush=True)
    with open(out / f"{name}.log", "w") as log:
        result = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT, text=True,
                                env=os.environ | {"OMP_NUM_THREADS": "1"},
                                stdout=subprocess.PIPE, stderr=log)
    if result.returncode:
        raise UsageError(f"step {name} ended with exit code {result.returncode}: see {log.name}")
    print(*result.stdout.splitlines()[:-1], sep="\n", flush=True)
    done.write_text(result.stdout.splitlines()[-1] + "\n")
    return round(time.monotonic() - began)


if __name__ == "__main__":
    run(main, Config)
