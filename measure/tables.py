"""measure/tables.py - reports in, tables for a person out; and reports in files, for everybody.

    a report, as a script ends with it --TABLES--> lines of text       --write--> results/NAME.json

    python -m measure.tables        a table of two made-up rows
"""

import json
import subprocess
import sys
from pathlib import Path

import torch

from measure import speed, speed_offload
from selection import Selector, allowance

RESULTS = Path(__file__).resolve().parent.parent / "results"
ALWAYS = Selector.SINKS + Selector.WINDOW


def cell(m: dict, form=".2f") -> str:
    return f"{m['mean']:{form}} [{m['low']:{form}}, {m['high']:{form}}]"


def grid(rows: dict, head: str) -> list[str]:
    """{row: {column: text}} -> aligned lines; a cell that is missing stays empty."""
    columns = list(dict.fromkeys(c for row in rows.values() for c in row))
    wide = {c: max(len(c), *(len(row.get(c, "")) for row in rows.values())) for c in columns}
    first = max(len(head), *map(len, rows))
    lines = [f"{head:{first}s}  " + "  ".join(f"{c:>{wide[c]}s}" for c in columns)]
    lines += [f"{name:{first}s}  " + "  ".join(f"{row.get(c, ''):>{wide[c]}s}" for c in columns)
              for name, row in rows.items()]
    return [line.rstrip() for line in lines]


def percent(budget: str) -> str:
    if budget == "1.0":  # dense
        return "all"
    return f"{float(budget):.0%}" if float(budget) <= 1 else f"{budget} tokens"


def measures(report: dict):
    """-> (task or measure, selector, budget, mean with its interval), one after the other"""
    for what, table in report["results"].items():
        for name, by in table.items():
            for budget, m in by.items():
                yield what, name, budget, m


def source(report: dict) -> str:
    n = sorted({m["n"] for *_, m in measures(report)})
    return (f"\nn = {', '.join(map(str, n))}; {report['hardware']}; commit {report['commit']}\n"
            f"{report['command']}")


def scores(report: dict) -> str:
    """Selectors down, tasks and budgets across."""
    rows, several = {}, len(report["results"]) > 1
    for task, name, budget, m in measures(report):
        share = percent(budget)
        rows.setdefault(name, {})[f"{task} {share}" if several else share] = cell(m)
    return "\n".join([*grid(rows, "selector"), source(report)])


def tasks(report: dict) -> str:
    """Tasks down, selectors and budgets across, and the attention that the butler keeps, of the
    oracle's; then what is left of dense where that is good."""
    rows, left = {}, {}
    for task, name, budget, m in measures(report):
        what = name if name == "dense" else f"{name} {percent(budget)}"
        rows.setdefault(task, {})[what] = cell(m)
        dense = report["results"][task]["dense"]["1.0"]["mean"]
        if dense >= 0.8 and name != "dense":
            left.setdefault(what, []).append(m["mean"] / dense)
    for task, by in report.get("kept of oracle", {}).items():
        for budget, m in by.get("butler", {}).items():
            rows[task][f"butler {percent(budget)}, kept"] = f"{m['mean']:.1%}"
    shares = ", ".join(f"{what} {sum(v) / len(v):.1%}" for what, v in left.items())
    end = [f"\nof dense, mean over the tasks where dense scores 0.8 or more: {shares}"] * bool(left)
    return "\n".join([*grid(rows, "task"), *end, source(report)])


def perplexity(report: dict) -> str:
    rows = {}
    for what, name, budget, m in measures(report):
        if what == "perplexity":
            rows.setdefault(name, {})[percent(budget)] = f"{m['mean']:.2f}"
        elif name != "dense":
            rows[name][f"over oracle {percent(budget)}"] = cell(m, "+.2%")
    seen = torch.arange(1, report["config"]["length"] + 1)
    shares = ", ".join(f"{percent(b)}: {(allowance(float(b), seen, ALWAYS) / seen).mean():.0%}"
                       for b in report["config"]["budgets"])
    shares = f"\nattended on average, with the {ALWAYS} tokens that are always granted: {shares}"
    return "\n".join([*grid(rows, "selector"), shares, source(report)])


def recall(report: dict) -> str:
    rows, mass = {}, report["layers"]["mass"]
    for measure, name, budget, m in measures(report):
        rows.setdefault(name, {})[f"{measure} {percent(budget)}"] = cell(m, ".3f")
        if measure == "mass":
            pairs = zip(mass[name][budget], mass["oracle"][budget], strict=True)
            worst = min(kept / best for kept, best in pairs)
            rows[name]["worst layer, of oracle's mass"] = f"{worst:.1%}"
    return "\n".join([*grid(rows, "selector"), source(report)])


def length(report: dict) -> str:
    """Contexts down, selectors across, a table for each budget."""
    tables = {}
    for what, name, budget, m in measures(report):
        measure, context = what.split(" @")
        if name not in ("dense", "oracle") and measure in ("kept of oracle", "over oracle"):
            form = ".1%" if measure == "kept of oracle" else "+.1%"
            row = tables.setdefault(budget, {}).setdefault(f"{int(context):,}", {})
            row[f"{name}, {measure}"] = cell(m, form)
    parts = ["\n".join(grid(rows, f"at {percent(b)}")) for b, rows in tables.items()]
    return "\n".join(["\n\n".join(parts), source(report)])


def drift(report: dict) -> str:
    """Selectors down, tasks across, each with the mean of its steps between two choices."""
    rows, steps = {}, report["steps between choices"]
    for task, name, budget, m in measures(report):
        row = rows.setdefault(name if name == "dense" else f"{name}, {percent(budget)}", {})
        row[task] = cell(m)
        if name != "dense":
            row[f"{task}, steps"] = f"{steps[task].get(f'{name}, {budget}', 1):.1f}"
    return "\n".join([*grid(rows, "choices kept"), source(report)])


def answers(report: dict) -> str:
    """Of forced answers: their loss, and how far it is above dense's."""
    rows, above = {}, report["loss above dense"]["data"]
    for name, by in report["loss"]["data"].items():
        for budget, m in by.items():
            row = rows.setdefault(name if name == "dense" else f"{name} {percent(budget)}", {})
            row["loss, nats a token"] = cell(m, ".3f")
            if name in above:
                dense = report["loss"]["data"]["dense"]["1.0"]["mean"]
                row["above dense"] = cell(above[name][budget], "+.4f")
                row["of dense"] = f"{above[name][budget]['mean'] / dense:+.2%}"
    return "\n".join([*grid(rows, "selector"), source(report)])


def tradeoff(report: dict) -> str:
    """A table for each task: score, time of a step, and how that compares with dense's."""
    tables = {}
    for task, name, budget, m in measures(report):
        row = {"score": cell(m), "ms a step": f"{m['ms']:.1f}"}
        if dense := report["results"][task].get("dense"):
            row["x dense"] = f"{dense['1.0']['ms'] / m['ms']:.2f}"
        label = name if name == "dense" else f"{name} {percent(budget)}"
        tables.setdefault(task, {})[label] = row
    parts = ["\n".join(grid(rows, task)) for task, rows in tables.items()]
    return "\n".join(["\n\n".join(parts), source(report)])


def timed(report: dict) -> str:
    rate = f"{report['copy_bytes_per_s'] / 1e9:.1f} GB/s copied"
    suite = speed_offload if report["config"]["suite"] == "offload" else speed
    command = report["command"]
    if "--intervals" in command:  # measured when there was such a flag
        command = f"at that commit: {command}"
    return "\n".join([suite.table(report), "", f"{report['hardware']}, {rate}; commit "
                      f"{report['commit']}", command])


def training(report: dict) -> str:
    """What the run comes to, for a person; README.md shows that of the default run."""
    contexts = list(report["table"]["dense"]["kept"])
    n = report["table"]["dense"]["kept"][contexts[0]]["n"]
    heads = [f"kept at {int(c):,}" for c in contexts]
    lines = ["  ".join(["selector", "attended", *heads, "co-reference exact  [95 %]"])]
    for name, row in report["table"].items():
        e, attended = row["coreference"], "100 %" if name == "dense" else "10 %"
        kept = "".join(f"  {row['kept'][c]['mean']:{len(head)}.3f}"
                       for c, head in zip(contexts, heads, strict=True))
        lines.append(f"{name:8s}  {attended:>8s}{kept}  {e['mean']:18.2f}"
                     f"  [{e['low']:.2f}, {e['high']:.2f}]")
    return "\n".join(lines + [
        "", f"attention kept: {n} held-out texts; co-reference: {e['n']} documents",
        f"KL on held-out text, mean of the layers: {report['kl_before']:.3f} before, "
        f"{report['kl']:.3f} after {report['config']['steps']} steps",
        f"{report['parameters']:,} parameters, {report['share']:.2%} of the base model's; "
        f"{report['seconds'] / 60:.1f} minutes, {report['peak_memory_gb'] or 0:.1f} GB at most",
        f"{report['hardware']}; commit {report['commit']}, seed {report['config']['seed']}",
        report["command"]])


def ablations(report: dict) -> str:
    """Butlers that differ in one thing; the script that trained them is in that commit."""
    rows, c = report["rows"], report["config"]
    contexts, tasks = list(rows["oracle"]["kept"]), list(rows["oracle"]["answers"])
    lines = [f"{'row':44s} parameters" + "".join(f"{f'kept at {int(n):,}':>15s}" for n in contexts)
             + "  over default [95 %]         " + "  ".join(tasks)]
    for name, row in rows.items():
        d, size = row.get("over_default"), row.get("parameters")
        lines.append(
            f"{name:44s} {f'{size:,}' if size else '':>10s}"
            + "".join(f"{row['kept'][n]['mean']:15.1%}" if "kept" in row else " " * 15
                      for n in contexts)
            + (f"  {d['mean']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}]" if d else " " * 28)
            + "  " + "  ".join(f"{row['answers'][t]['mean']:{len(t)}.2f}" for t in tasks))
    n = ", ".join(f"{m['n']}" for m in rows["oracle"]["answers"].values())
    return "\n".join([*lines, "", f"{c['steps']} steps each, {c['windows']} windows, "
                      f"documents: {n}; {report['hardware']}; commit {report['commit']}\n"
                      f"at that commit: {report['command']}"])


def compare(report: dict) -> str:
    """A row for each candidate at each context."""
    lines = [f"{'context':>8s}  {'':38s} {'ms a step':>10s} {'tokens/s':>9s} {'reading, s':>11s}"]
    lines += [f"{r['context']:8,}  {r['candidate']:38s} {r['ms']:10.1f} {1e3 / r['ms']:9.1f}"
              + (f" {r['first_token_s']:11.1f}" if r["first_token_s"] else "")
              for r in report["rows"]]
    return "\n".join([*lines, "", f"{report['hardware']}; commit {report['commit']}",
                      report["command"]])


TABLES = {"train": training, "train_default": training, "ablations": ablations,
          "perplexity": perplexity, "recall": recall, "length": length, "length_25": length,
          "length_default": length, "drift": drift, "drift_coreference": drift, "ruler": tasks,
          "ruler_4096": tasks, "ruler_8000": tasks, "ruler_rivals": tasks, "long_answers": answers}
TIMED = {"compare": compare, "attention": timed, "speed": timed, "offload": timed,
         "tradeoff": tradeoff}


def result(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def headline() -> str:
    """Of every processor that whole steps were timed on, the shortest and the longest text, and
    where choosing begins to pay."""
    lines = ["| processor | tokens cached | dense, ms | butler, ms | faster from |",
             "|---|---|---|---|---|"]
    for path in sorted(RESULTS.glob("speed_*.json")):
        report = result(path.stem)
        if report["config"]["shape"]:
            continue
        ends = [row["context"] for row in report["rows"]]
        for context in min(ends), max(ends):
            rows = [row for row in report["rows"] if row["context"] == context]
            dense = min(row["ms"] for row in rows if row["kept"] is None)
            (butler,) = (row["ms"] for row in rows if row["selector"].startswith("butler"))
            kind = path.stem.removeprefix("speed_")
            start = next(iter(report["break_even"].values()))
            hardware = report["hardware"].replace(f" ({kind})", "")
            lines.append(f"| {hardware}, {kind} | {context:,} | {dense:.1f} | "
                         f"{butler:.1f} | {start:,} tokens |")
    return "\n".join(lines)


def paper() -> str:
    """What the paper (arXiv 2503.07518) reports beside what was measured here."""
    shares, few = result("coreference")["results"], result("budgets")["results"]
    few, shares = few["coreference"], shares["coreference"]
    over = result("perplexity")["results"]["over_oracle"]["butler"]
    drift, steps = (result("drift")[key] for key in ("results", "steps between choices"))
    drift |= result("drift_coreference")["results"]
    kept = result("length")["results"]["kept of oracle @8000"]["butler"]["0.1"]
    names = "coreference", "needle_prose@4096", "copy@1024"
    pairs = [[drift[task][f"butler, drift {d}"]["0.1"]["mean"] for d in ("0", "0.25")]
             for task in names]
    stale = [f"{100 * (after - before):+.0f}" for before, after in pairs]
    documents = ", ".join(f"{drift[task]['dense']['1.0']['n']}" for task in names)
    every = [steps[task]["butler, drift 0.25, 0.1"] for task in names]
    solved = [by for file in ("ruler", "ruler_4096", "ruler_8000")
              for by in result(file)["results"].values() if by["dense"]["1.0"]["mean"] >= 0.8]
    share = [by["butler"]["0.1"]["mean"] / by["dense"]["1.0"]["mean"] for by in solved]
    file = result("offload_llama-3.2-1b_avx512-bf16")
    at_once = next(r for r in file["rows"] if r["selector"].endswith((" 1", "drift 0")))
    train = result("train")
    rows = [
        ("co-reference, near the oracle where others fail",
         "half kept, answers right: oracle .81, butler .78, H2O .10, Quest .06; Llama-3.2-3B, "
         "n = 11",
         f"a tenth kept, answers right: dense {shares['dense']['1.0']['mean']:.2f}, oracle "
         f"{shares['oracle']['0.1']['mean']:.2f}, butler {shares['butler']['0.1']['mean']:.2f}, "
         f"n = {shares['butler']['0.1']['n']}; H2O {few['h2o']['0.1']['mean']:.2f}, Quest "
         f"{few['quest']['0.1']['mean']:.2f}, n = {few['h2o']['0.1']['n']}",
         "same, with fewer tokens"),
        ("parameters", "about 1 %", f"{train['share']:.2%}", "same"),
        ("perplexity above the oracle's", "2.4 % with half kept; Llama-3.2-1B, WikiText-2",
         f"{over['0.5']['mean']:.1%} with half, {over['0.1']['mean']:.1%} with a tenth; "
         f"encyclopedia, n = {over['0.5']['n']}", "better, on another model and text"),
        ("far beyond 512 tokens", "no number",
         f"keeps {kept['mean']:.1%} of what the oracle keeps at 8,000, n = {kept['n']}", "new"),
        ("RULER", "competitive", f"{sum(share) / len(share):.0%} of dense, RULER-style, mean of "
         f"{len(share)} tasks at 1k to 8k that dense solves, a tenth kept, n = "
         f"{solved[0]['butler']['0.1']['n']}", "same"),
        ("a choice kept for several steps", "within 1.1 points",
         f"kept for {min(every):.1f} to {max(every):.1f} steps: co-reference {stale[0]}, "
         f"needles {stale[1]}, copies {stale[2]} points, n = {documents}",
         "worse on copies, which need other tokens each step"),
        ("speed on a GPU", "1.6 times", "not measured yet", ""),
        ("a step with the cache beyond the bus, or in a file", "7.6 times as fast as dense at 1M "
         "tokens; A6000",
         f"{at_once['speedup']:.1f} times as fast at {at_once['context']:,} tokens, file "
         f"{at_once['cache_bytes'] / at_once['limit_bytes']:.1f} times the memory; llama-3.2-1b's "
         "shape, 2 CPU cores", "same")]
    head = ["| claim | the paper | here, SmolLM2-135M unless said | |", "|---|---|---|---|"]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)])


MADE = {"headline": headline, "paper": paper}


def table(name: str, report: dict) -> str:
    """Of results/NAME.json."""
    return (TIMED.get(name.split("_")[0]) or TABLES.get(name, scores))(report)


def write(config, report: dict, name: str) -> dict:
    """Where --write asks for it: results/NAME.json, and all tables and figures anew."""
    if config.write:
        written = RESULTS / f"{name}.json"
        written.write_text(json.dumps({"config": vars(config)} | report, indent=1) + "\n")
        subprocess.run([sys.executable, RESULTS / "render.py"], check=True)
    return report


if __name__ == "__main__":
    rows = {"oracle": {"10%": 0.98, "25%": 1.0}, "recency": {"10%": 0.0}}
    print("\n".join(grid({name: {budget: f"{share:.2f}" for budget, share in row.items()}
                          for name, row in rows.items()}, "selector")))
