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


def grid(cells) -> str:
    """(head, row, column, text), one a cell -> aligned lines, an empty one between the tables of
    two heads; a cell that is missing stays empty."""
    tables, texts = {}, []
    for head, row, column, text in cells:
        tables.setdefault(head, {}).setdefault(row, {})[column] = text
    for head, rows in tables.items():
        columns = dict.fromkeys(column for row in rows.values() for column in row)
        lines = [[head, *columns], *([name, *(row.get(column, "") for column in columns)]
                                     for name, row in rows.items())]
        first, *wide = (max(map(len, column)) for column in zip(*lines, strict=True))
        texts.append("\n".join("  ".join([name.ljust(first), *map(str.rjust, row, wide)]).rstrip()
                               for name, *row in lines))
    return "\n\n".join(texts)


def percent(budget: str) -> str:
    if budget == "1.0":  # dense
        return "all"
    return f"{float(budget):.0%}" if float(budget) <= 1 else f"{budget} tokens"


def label(name: str, budget: str) -> str:
    return name if name == "dense" else f"{name} {percent(budget)}"


def measures(report: dict, part="results"):
    """-> (task or measure, selector, budget, mean with its interval), one after the other"""
    for what, table in report.get(part, {}).items():
        for name, by in table.items():
            for budget, m in by.items():
                yield what, name, budget, m


def source(report: dict, *facts: str) -> str:
    """What stands below a table: where its numbers are from."""
    if n := sorted({m["n"] for *_, m in measures(report)}):
        facts = f"n = {', '.join(map(str, n))}",
    command = report["command"]
    if "ablate.py" in command:  # when there was such a script
        command = f"at that commit: {command}"
    facts = "; ".join([*facts, report["hardware"], f"commit {report['commit']}"])
    return f"\n\n{facts}\n{command}"


def scores(report: dict) -> str:
    """Selectors down, tasks and budgets across."""
    several = len(report["results"]) > 1
    return grid(("selector", name, f"{task} " * several + percent(budget), cell(m))
                for task, name, budget, m in measures(report)) + source(report)


def tasks(report: dict) -> str:
    """Tasks down, selectors and budgets across, and the attention that the butler keeps, of the
    oracle's; then what is left of dense where that is good."""
    cells, left = [], {}
    for task, name, budget, m in measures(report):
        cells.append(("task", task, label(name, budget), cell(m)))
        dense = report["results"][task]["dense"]["1.0"]["mean"]
        if dense >= 0.8 and name != "dense":
            left.setdefault(label(name, budget), []).append(m["mean"] / dense)
    cells += [("task", task, f"{label(name, budget)}, kept", f"{m['mean']:.1%}")
              for task, name, budget, m in measures(report, "kept of oracle") if name == "butler"]
    shares = ", ".join(f"{what} {sum(v) / len(v):.1%}" for what, v in left.items())
    end = f"\n\nof dense, mean over the tasks where dense scores 0.8 or more: {shares}" * bool(left)
    return grid(cells) + end + source(report)


def perplexity(report: dict) -> str:
    cells = []
    for what, name, budget, m in measures(report):
        if what == "perplexity":
            cells.append(("selector", name, percent(budget), f"{m['mean']:.2f}"))
        elif name != "dense":
            cells.append(("selector", name, f"over oracle {percent(budget)}", cell(m, "+.2%")))
    seen = torch.arange(1, report["config"]["length"] + 1)
    shares = ", ".join(f"{percent(b)}: {(allowance(float(b), seen, ALWAYS) / seen).mean():.0%}"
                       for b in report["config"]["budgets"])
    return (f"{grid(cells)}\n\nattended on average, with the {ALWAYS} tokens that are always "
            f"granted: {shares}{source(report)}")


def recall(report: dict) -> str:
    cells, mass = [], report["layers"]["mass"]
    for measure, name, budget, m in measures(report):
        cells.append(("selector", name, f"{measure} {percent(budget)}", cell(m, ".3f")))
        if measure == "mass":
            pairs = zip(mass[name][budget], mass["oracle"][budget], strict=True)
            worst = min(kept / best for kept, best in pairs)
            cells.append(("selector", name, "worst layer, of oracle's mass", f"{worst:.1%}"))
    return grid(cells) + source(report)


def length(report: dict) -> str:
    """Contexts down, selectors across, a table for each budget."""
    cells, forms = [], {"kept of oracle": ".1%", "over oracle": "+.1%"}
    for what, name, budget, m in measures(report):
        measure, context = what.split(" @")
        if name != "dense" and measure in forms:
            cells.append((f"at {percent(budget)}", f"{int(context):,}", f"{name}, {measure}",
                          cell(m, forms[measure])))
    return grid(cells) + source(report)


def drift(report: dict) -> str:
    """Selectors down, tasks across, each with the mean of its steps between two choices."""
    cells, steps = [], report["steps between choices"]
    for task, name, budget, m in measures(report):
        row = name if name == "dense" else f"{name}, {percent(budget)}"
        cells.append(("choices kept", row, task, cell(m)))
        if name != "dense":
            interval = steps[task].get(f"{name}, {budget}", 1)
            cells.append(("choices kept", row, f"{task}, steps", f"{interval:.1f}"))
    return grid(cells) + source(report)


def answers(report: dict) -> str:
    """Of forced answers: their loss, and how far it is above dense's."""
    cells, above = [], report["loss above dense"]
    for task, name, budget, m in measures(report, "loss"):
        row = {"loss, nats a token": cell(m, ".3f")}
        if name in above[task]:
            more, dense = above[task][name][budget], report["loss"][task]["dense"]["1.0"]["mean"]
            row |= {"above dense": cell(more, "+.4f"), "of dense": f"{more['mean'] / dense:+.2%}"}
        cells += [("selector", label(name, budget), *entry) for entry in row.items()]
    return grid(cells) + source(report)


def tradeoff(report: dict) -> str:
    """A table for each task: score, time of a step, and how that compares with dense's."""
    cells = []
    for task, name, budget, m in measures(report):
        row = {"score": cell(m), "ms a step": f"{m['ms']:.1f}"}
        if dense := report["results"][task].get("dense"):
            row["x dense"] = f"{dense['1.0']['ms'] / m['ms']:.2f}"
        cells += [(task, label(name, budget), *entry) for entry in row.items()]
    return grid(cells) + source(report)


def timed(report: dict) -> str:
    rate = f"{report['copy_bytes_per_s'] / 1e9:.1f} GB/s copied"
    suite = speed_offload if report["config"]["suite"] == "offload" else speed
    return suite.table(report) + source(report | {"hardware": f"{report['hardware']}, {rate}"})


def training(report: dict) -> str:
    """What the run comes to, for a person; README.md shows that of the default run."""
    heads = [f"kept at {int(context):,}" for context in report["table"]["dense"]["kept"]]
    lines = ["  ".join(["selector", "attended", *heads, "co-reference exact  [95 %]"])]
    for name, row in report["table"].items():
        e, kept = row["coreference"], list(row["kept"].values())
        shares = "".join(f"  {m['mean']:{len(head)}.3f}"
                         for head, m in zip(heads, kept, strict=True))
        lines.append(f"{name:8s}  {'100 %' if name == 'dense' else '10 %':>8s}{shares}"
                     f"  {e['mean']:18.2f}  [{e['low']:.2f}, {e['high']:.2f}]")
    return "\n".join(lines + [
        "", f"attention kept: {kept[0]['n']} held-out texts; co-reference: {e['n']} documents",
        f"KL on held-out text, mean of the layers: {report['kl_before']:.3f} before, "
        f"{report['kl']:.3f} after {report['config']['steps']} steps",
        f"{report['parameters']:,} parameters, {report['share']:.2%} of the base model's; "
        f"{report['seconds'] / 60:.1f} minutes, {report['peak_memory_gb'] or 0:.1f} GB at most",
        f"{report['hardware']}; commit {report['commit']}, seed {report['config']['seed']}",
        report["command"]])


def ablations(report: dict) -> str:
    """Butlers that differ in one thing; the script that trained them is in that commit."""
    rows, c = report["rows"], report["config"]
    contexts, tasks = rows["oracle"]["kept"], rows["oracle"]["answers"]
    lines = [f"{'row':44s} parameters" + "".join(f"{f'kept at {int(n):,}':>15s}" for n in contexts)
             + "  over default [95 %]         " + "  ".join(tasks)]
    for name, row in rows.items():
        size = f"{row['parameters']:,}" if "parameters" in row else ""
        kept = "".join(f"{row['kept'][n]['mean']:15.1%}" for n in contexts if "kept" in row)
        over = cell(row["over_default"], "+.4f") if "over_default" in row else ""
        right = "  ".join(f"{row['answers'][t]['mean']:{len(t)}.2f}" for t in tasks)
        lines.append(f"{name:44s} {size:>10s}{kept:{15 * len(contexts)}s}  {over:26s}  {right}")
    n = ", ".join(f"{m['n']}" for m in tasks.values())
    return "\n".join(lines) + source(
        report, f"{c['steps']} steps each, {c['windows']} windows, documents: {n}")


def compare(report: dict) -> str:
    """A row for each candidate at each context."""
    lines = [f"{'context':>8s}  {'':38s} {'ms a step':>10s} {'tokens/s':>9s} {'reading, s':>11s}"]
    lines += [f"{r['context']:8,}  {r['candidate']:38s} {r['ms']:10.1f} {1e3 / r['ms']:9.1f}"
              + (f" {r['first_token_s']:11.1f}" if r["first_token_s"] else "")
              for r in report["rows"]]
    return "\n".join(lines) + source(report)


TABLES = {"train": training, "ablations": ablations, "perplexity": perplexity, "recall": recall,
          "length": length, "drift": drift, "ruler": tasks, "long": answers, "compare": compare,
          "attention": timed, "speed": timed, "offload": timed, "tradeoff": tradeoff}


def table(name: str, report: dict) -> str:
    """Of results/NAME.json: the first word of a name says which table it has."""
    return TABLES.get(name.split("_")[0], scores)(report)


def result(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def markdown(head: str, rows: list[tuple]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|---" * (head.count("|") - 1) + "|", *lines])


def headline() -> str:
    """Of every processor that whole steps were timed on, the shortest and the longest text, and
    where choosing begins to pay."""
    rows = []
    for path in sorted(RESULTS.glob("speed_*.json")):
        report, kind = result(path.stem), path.stem.removeprefix("speed_")
        if report["config"]["shape"]:
            continue
        hardware = report["hardware"].replace(f" ({kind})", "")
        start = next(iter(report["break_even"].values()))
        ends = [row["context"] for row in report["rows"]]
        for context in min(ends), max(ends):
            ms = [min(row["ms"] for row in report["rows"] if row["context"] == context
                      and row["selector"].startswith(name)) for name in ("dense", "butler")]
            rows.append((f"{hardware}, {kind}", f"{context:,}", *(f"{t:.1f}" for t in ms),
                         f"{start:,} tokens"))
    return markdown("| processor | tokens cached | dense, ms | butler, ms | faster from |", rows)


def paper() -> str:
    """What the paper (arXiv 2503.07518) reports beside what was measured here."""
    def tenth(file):
        return {name: by.get("0.1") or by["1.0"]  # dense
                for name, by in result(file)["results"]["coreference"].items()}

    over = result("perplexity")["results"]["over_oracle"]["butler"]
    kept = result("length")["results"]["kept of oracle @8000"]["butler"]["0.1"]
    drift, every = (result("drift")[key] for key in ("results", "steps between choices"))
    drift |= result("drift_coreference")["results"]
    names = "coreference", "needle_prose@4096", "copy@1024"
    every = [every[task]["butler, drift 0.25, 0.1"] for task in names]
    fresh, stale = ([100 * drift[task][f"butler, drift {d}"]["0.1"]["mean"] for task in names]
                    for d in ("0", "0.25"))
    documents = ", ".join(f"{drift[task]['dense']['1.0']['n']}" for task in names)
    solved = [by for file in ("ruler", "ruler_4096", "ruler_8000")
              for by in result(file)["results"].values() if by["dense"]["1.0"]["mean"] >= 0.8]
    share = [by["butler"]["0.1"]["mean"] / by["dense"]["1.0"]["mean"] for by in solved]
    file = result("offload_llama-3.2-1b_avx512-bf16")
    at_once = next(r for r in file["rows"] if r["selector"].endswith("drift 0"))
    return markdown("| claim | the paper | here, SmolLM2-135M unless said | |", [
        ("co-reference, near the oracle where others fail",
         "half kept, answers right: oracle .81, butler .78, H2O .10, Quest .06; Llama-3.2-3B, "
         "n = 11",
         "a tenth kept, answers right: dense {dense[mean]:.2f}, oracle {oracle[mean]:.2f}, "
         "butler {butler[mean]:.2f}, n = {butler[n]}; ".format(**tenth("coreference"))
         + "H2O {h2o[mean]:.2f}, Quest {quest[mean]:.2f}, n = {h2o[n]}".format(**tenth("budgets")),
         "same, with fewer tokens"),
        ("parameters", "about 1 %", f"{result('train')['share']:.2%}", "same"),
        ("perplexity above the oracle's", "2.4 % with half kept; Llama-3.2-1B, WikiText-2",
         f"{over['0.5']['mean']:.1%} with half, {over['0.1']['mean']:.1%} with a tenth; "
         f"encyclopedia, n = {over['0.5']['n']}", "better, on another model and text"),
        ("far beyond 512 tokens", "no number",
         f"keeps {kept['mean']:.1%} of what the oracle keeps at 8,000, n = {kept['n']}", "new"),
        ("RULER", "competitive", f"{sum(share) / len(share):.0%} of dense, RULER-style, mean of "
         f"{len(share)} tasks at 1k to 8k that dense solves, a tenth kept, n = "
         f"{solved[0]['butler']['0.1']['n']}", "same"),
        ("a choice kept for several steps", "within 1.1 points",
         f"kept for {min(every):.1f} to {max(every):.1f} steps: "
         "co-reference {:+.0f}, needles {:+.0f}, copies {:+.0f} points, ".format(
             *(b - a for a, b in zip(fresh, stale, strict=True))) + f"n = {documents}",
         "worse on copies, which need other tokens each step"),
        ("speed on a GPU", "1.6 times", "not measured yet", ""),
        ("a step with the cache beyond the bus, or in a file", "7.6 times as fast as dense at 1M "
         "tokens; A6000",
         f"{at_once['speedup']:.1f} times as fast at {at_once['context']:,} tokens, file "
         f"{at_once['cache_bytes'] / at_once['limit_bytes']:.1f} times the memory; llama-3.2-1b's "
         "shape, 2 CPU cores", "same")])


MADE = {"headline": headline, "paper": paper}


def write(config, report: dict, name: str) -> dict:
    """Where --write asks for it: results/NAME.json, and all tables and figures anew."""
    if config.write:
        written = RESULTS / f"{name}.json"
        written.write_text(json.dumps({"config": vars(config)} | report, indent=1) + "\n")
        subprocess.run([sys.executable, RESULTS / "render.py"], check=True)
    return report


if __name__ == "__main__":
    print(grid([("selector", "oracle", "10%", "0.98"), ("selector", "oracle", "25%", "1.00"),
                ("selector", "recency", "10%", "0.00")]))
