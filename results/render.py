"""results/render.py - writes the tables of the two READMEs from the JSON files in this folder.

    <!-- results/NAME.json --> ... <!-- end -->      what is between becomes the table of that file
    <!-- results/NAME.json: a, b --> ...             only what begins with a or b
    <!-- results: paper --> ... <!-- end -->         the paper's numbers beside those of this folder
    <!-- results: ruler --> ...                      another summary, see SUMMARIES

and draws the figures (draw.py), if matplotlib is installed.

    python results/render.py
"""

import io
import json
import re
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
sys.path.insert(0, str(ROOT))

import cli
import train
from cli import UserError

RULER = ("ruler", "ruler_4096", "ruler_8000")  # files of the same tasks
SOLVED = 0.8  # a task and length that the dense model solves: so many answers are right

MARKER = re.compile(r"<!-- results(?:/(\S+)\.json)?(?:: (.*?))? -->\n.*?<!-- end -->", re.S)


def load(name: str) -> dict:
    """results/NAME.json. Raises UserError for a file that is no report."""
    path = RESULTS / f"{name}.json"
    with cli.one_line(str(path)):
        report = json.loads(cli.read_text(path))
        if not (isinstance(report, dict) and "command" in report):
            raise UserError("expected one JSON object, the report of a script")
    for row in report.get("rows", []):
        if row.get("suite") in ("speed", "attention") and row["kept"] is None:
            row["selector"] = "dense"  # one of several forms
    report["rows"] = [row for row in report.get("rows", [])
                      if not re.search("alone|nothing", row["selector"])]  # parts of a step
    return report


# ---------------------------------------------------------------------------- tables


def number(x: float) -> str:
    return f"{x:.3f}" if abs(x) < 10 else f"{x:.1f}"


def cell(m: dict) -> str:
    return f"{number(m['mean'])} [{number(m['low'])}, {number(m['high'])}]"


def share(budget: str) -> str:
    """ "0.05" -> "5 %", "256" -> "256 tokens" """
    return f"{100 * float(budget):g} %" if float(budget) <= 1 else f"{budget} tokens"


def markdown(corner: str, cells: dict) -> str:
    """{(row, column): text} -> a table, in the order in which rows and columns first appear."""
    rows = dict.fromkeys(row for row, _ in cells)
    columns = dict.fromkeys(column for _, column in cells)
    lines = [[corner, *columns], ["---"] * (1 + len(columns))]
    lines += [[row, *(cells.get((row, column), "") for column in columns)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measures(results: dict):
    """-> (task, selector, budget, mean and interval), one after the other"""
    for task, table in results.items():
        for name, by_budget in table.items():
            for budget, m in by_budget.items():
                yield task, name, budget, m


def scores_table(results: dict) -> str:
    """Selectors down, tasks and budgets across; of more than 4 tasks these are down. Dense has no
    budget: its number stands under each of them."""
    entries = list(measures(results))
    tasks = list(results)
    budgets = list(dict.fromkeys(b for _, name, b, _ in entries if name != "dense")) or ["1.0"]
    cells = {}
    for task, name, budget, m in entries:
        text = cell(m) + "".join(f"; {m[key]:.1f} {key}" for key in ("ms", "steps", "seconds")
                                 if key in m)
        if len(tasks) > 4:
            cells[task, name if name == "dense" else f"{name}, {share(budget)}"] = text
            continue
        for under in budgets if name == "dense" else [budget]:
            column = [task] * (len(tasks) > 1) + [share(under)] * (len(budgets) > 1)
            cells[name, ", ".join(column) or share(under)] = text
    corner = tasks[0] if len(tasks) == 1 else share(budgets[0]) if len(budgets) == 1 else ""
    return markdown("" if len(tasks) > 4 else corner, cells)


def rows_table(rows: list[dict]) -> str:
    """Candidates down, numbers of cached tokens across; the fastest of several dense forms."""
    cells, fastest = {}, {}
    for row in rows:
        name, kept, context = row["selector"], row.get("kept"), f"{row['context']:,}"
        if kept and not name.startswith("dense") and f"{kept:g}" not in name:
            name += f", {share(f'{kept:g}')}"
        if row["ms"] > fastest.get((name, context), row["ms"]):
            continue
        fastest[name, context] = row["ms"]
        faster = f" ({row['speedup']:.2f}x)" if row.get("speedup") else ""
        cells[name, context] = f"{row['ms']:.1f}{faster}"
    return markdown("ms a step behind so many tokens", cells)


def train_table(report: dict) -> str:
    text = io.StringIO()
    with redirect_stdout(text):
        train.print_table(report)
    lines = text.getvalue().strip("\n")  # the first line is indented
    return f"```\n{lines}\n```"


def table(report: dict, only: str | None = None) -> str:
    """The table of any report, and below it where its numbers are from."""
    facts = []
    if "table" in report:
        text = train_table(report)
    elif "results" in report:
        results = {task: by for task, by in report["results"].items()
                   if only is None or task.startswith(tuple(only.split(", ")))}
        text = scores_table(results)
        n = {m["n"] for *_, m in measures(results)}
        facts.append(f"n = {', '.join(map(str, sorted(n)))}")
    else:
        text = rows_table(report["rows"])
        engine = report.get("config", {}).get("engine")
        facts += [f"engine {engine}"] * (engine in cli.ENGINES)
    return f"{text}\n\n{'; '.join([*facts, origin(report)])}"


def origin(report: dict) -> str:
    return f"{report['hardware']}; commit {report['commit']}: `{report['command']}`"


def fastest(rows: list[dict], key: str) -> dict:
    """-> {(first word of the selector, context): the smallest number under this key}, without
    transformers with our butler. Dense and transformers have several forms."""
    least = {}
    for row in rows:
        if row.get(key) and "our butler" not in row["selector"]:
            at = row["selector"].replace(",", " ").split()[0], row["context"]
            least[at] = min(row[key], least.get(at, row[key]))
    return least


def wait() -> str:
    """Seconds that a prompt and an answer of 100 tokens take, of every candidate."""
    files = {path.stem.removeprefix("compare_"): load(path.stem)
             for path in sorted(RESULTS.glob("compare_*.json"))}
    cells = {}
    for processor, report in files.items():
        prompts, steps = (fastest(report["rows"], key) for key in ("first_token_s", "ms"))
        for (name, context), seconds in prompts.items():
            label = name + f", {processor}" * (len(files) > 1)
            if context >= 2000:
                whole = seconds + 0.1 * steps[name, context]  # 100 steps of so many milliseconds
                cells[label, f"{context:,} tokens"] = f"{whole:.1f} s"
    table = markdown("prompt, then 100 new tokens", cells)
    return "\n\n".join([table, *map(origin, files.values())])


def ruler_scores() -> dict:
    """-> {(task, context): {selector: {budget: mean and interval}}}"""
    scores = {}
    for file in RULER:
        report = load(file)
        for key, by_name in report["results"].items():
            task, _, context = key.partition("@")
            scores[task, int(context or report["config"]["context"][0])] = by_name
    return scores


def ruler() -> str:
    """Tasks down, lengths across: the butler's score with a tenth of the tokens, then dense."""
    cells = {}
    for (task, context), by in ruler_scores().items():
        butler, dense = by["butler"]["0.1"], by["dense"]["1.0"]
        text = f"{butler['mean']:.2f} of {dense['mean']:.2f}"
        if "sketch" in by:
            text += f"; sketch {by['sketch']['0.1']['mean']:.2f}"
        failed = dense["mean"] < SOLVED
        cells[task, f"{context:,} tokens"] = f"*{text}*" if failed else text
    n = sorted({m["n"] for by in ruler_scores().values() for *_, m in measures({"": by})})
    solved = of_dense()
    means = " and ".join(f"{sum(shares) / len(shares):.1%} with {share(budget)}"
                         for budget, shares in solved.items())
    return "\n\n".join([markdown("butler, 10 %, of dense", cells),
                        f"Cells in italics: the dense model itself answers fewer than "
                        f"{SOLVED:.0%}. In the other {len(solved['0.1'])} the butler reaches "
                        f"{means} of the dense score, in the mean. n = {', '.join(map(str, n))}",
                        *(origin(load(file)) for file in RULER)])


def of_dense() -> dict:
    """-> {budget: the butler's score as a share of dense, of every task and length that the dense
    model solves}"""
    shares = {"0.05": [], "0.1": []}
    for by in ruler_scores().values():
        dense = by["dense"]["1.0"]["mean"]
        for budget, found in shares.items():
            if dense >= SOLVED:
                found.append(by["butler"][budget]["mean"] / dense)
    return shares


def ruler_prefill() -> str:
    """Tasks down, lengths across: the same documents, their contexts read sparsely."""
    report, scores = load("ruler_prefill"), ruler_scores()
    cells = {}
    for key, by in report["results"].items():
        task, context = key.split("@")
        dense = scores[task, int(context)]["dense"]["1.0"]
        butler = by["butler"]["0.1"]
        if dense["n"] != butler["n"]:
            raise UserError(f"{key}: {butler['n']} documents beside {dense['n']}")
        cells[task, f"{int(context):,} tokens"] = f"{cell(butler)} of {number(dense['mean'])}"
    n = report["config"]["n"]
    return "\n\n".join([markdown("butler, 10 %, of dense", cells), f"n = {n}; {origin(report)}"])


def agreement() -> str:
    """Budgets down: three measures of how far the butler's steps are those of the dense model."""
    report = load("agreement")
    words = {"same token": "same likeliest token", "KL": "KL(dense, sparse), nats",
             "equal text": "equal tokens of a greedy text, of 64"}
    cells = {}
    for task, name, budget, m in measures(report["results"]):
        what, context = task.split(" @")
        cells[f"{name}, {share(budget)} of {int(context):,} tokens", words[what]] = cell(m)
    n = report["config"]["n"]
    return "\n\n".join([markdown("", cells), f"n = {n}; {origin(report)}"])


def foresight() -> str:
    """Selectors down: bytes per token and KV head that each reads to choose, and the share of the
    oracle's attention that it keeps at three lengths, in all layers and in two groups of them."""
    report = load("length")
    groups = {"layers 1 to 5": slice(0, 5), "layers 6 to 29": slice(5, None)}
    cells = {}
    for context in "512", "2048", "8000":
        layers = {name: by["0.1"] for name, by in report["layers"][f"kept @{context}"].items()}
        at = f"{int(context):,} tokens"
        for name, by in report["results"][f"kept of oracle @{context}"].items():
            cells[name, "bytes"] = f"{report['bytes'][name]:g}"
            cells[name, at] = cell(by["0.1"])
            for title, part in groups.items():
                kept = sum(layers[name][part]) / sum(layers["oracle"][part])
                cells[name, f"{at}, {title}"] = number(kept)
    n = report["config"]["n"]
    return "\n\n".join([markdown("kept, of oracle", cells), f"n = {n}; {origin(report)}"])


def untrained() -> str:
    """The paper table's words about selections without training: the same bytes per token, and the
    layer's own query, or queries from the layers below."""
    kept = load("length")["results"]["kept of oracle @8000"]
    words = {"butler": "butler", "sketch": "untrained: own query", "ahead1": "from one layer below",
             "ahead5": "from up to five below"}
    return ", ".join(f"{what} {kept[name]['0.1']['mean']:.1%}" for name, what in words.items())


def paper() -> str:
    """What the paper (arXiv 2503.07518) reports beside what was measured here."""
    def at(file, task, budget="0.1"):
        """-> {selector: mean and interval}, dense included"""
        return {name: by.get(budget, by.get("1.0"))
                for name, by in load(file)["results"][task].items()}

    ours, rivals = at("coreference", "coreference"), at("budgets", "coreference")
    half = at("budgets", "coreference", "0.5")
    perplexity = load("perplexity")["results"]["perplexity"]
    above = perplexity["oracle"]["0.1"]["mean"] / perplexity["dense"]["1.0"]["mean"] - 1
    over = load("perplexity")["results"]["over oracle"]["butler"]
    shares = of_dense()
    drift = {task: {name: by["0.1"] for name, by in table.items() if name != "dense"}
             for file in ("drift_coreference", "drift")
             for task, table in load(file)["results"].items()}
    lost = {task: 100 * (by["butler, drift 0.25"]["mean"] - by["butler, drift 0"]["mean"])
            for task, by in drift.items()}
    worst = min((task for task in lost if task.startswith("coreference")), key=lost.get)
    stale = drift[worst]["butler, drift 0.25"]
    files = sorted(RESULTS.glob("offload_llama-3.2-1b_*.json"))
    rows = load(files[-1].stem)["rows"]
    offloaded = next(row for row in rows if "butler" in row["selector"]
                     and "look-ahead" not in row["selector"])
    rows = [
        ("co-reference, answers right", "half kept: oracle .81, butler .78, H2O .10, Quest .06 "
         "(Llama-3.2-3B, n = 11)",
         f"a tenth kept: oracle {ours['oracle']['mean']:.2f}, butler {ours['butler']['mean']:.2f} "
         f"(n = {ours['butler']['n']}); untrained sketch {rivals['sketch']['mean']:.2f}, H2O "
         f"{rivals['h2o']['mean']:.2f}, Quest "
         f"{rivals['quest']['mean']:.2f} (with half kept {half['quest']['mean']:.2f}; "
         f"n = {rivals['quest']['n']})"),
        ("parameters of the predictor", "about 1 %", f"{load('train')['share']:.2%}"),
        ("perplexity above the oracle's", "2.4 % with half kept (Llama-3.2-1B, WikiText-2)",
         f"{over['0.5']['mean']:.1%} with half kept, {over['0.1']['mean']:.1%} with a tenth, "
         f"where the oracle's is {above:.0%} above dense (encyclopedia, n = {over['0.5']['n']})"),
        ("attention kept at 8,000 tokens, of the oracle's", "not reported", untrained()),
        ("RULER", "competitive with dense",
         f"{sum(shares['0.1']) / len(shares['0.1']):.0%} of dense with a tenth, RULER-style: mean "
         f"of {len(shares['0.1'])} pairs of task and length that dense solves"),
        ("one choice serves several steps", "within 1.1 points",
         f"`--drift 0.25`, {stale['steps']:.1f} steps: {lost[worst]:+.0f} points on the worst of "
         f"three kinds of co-reference (n = {stale['n']}), {lost['copy']:+.0f} on copies "
         f"(n = {drift['copy']['butler, drift 0']['n']})"),
        ("speed on a GPU", "1.6 times dense", "not measured"),
        ("keys and values offloaded", "7.6 times dense at 1M tokens (A6000, host memory)",
         f"{offloaded['speedup']:.1f} times dense at {offloaded['context']:,} tokens, 1,024 of "
         "them attended (2 CPU cores, file, random weights in the shape of Llama-3.2-1B)")]
    return markdown("claim", {(row[0], column): text for row in rows for column, text in
                              zip(("the paper", "here, SmolLM2-135M"), row[1:], strict=True)})


SUMMARIES = {"paper": paper, "ruler": ruler, "ruler_prefill": ruler_prefill,
             "agreement": agreement, "foresight": foresight, "wait": wait}

# ---------------------------------------------------------------------------- files


def render(text: str) -> str:
    """A README's text -> the same with every table written anew."""
    def block(match):
        name, only = match.groups()
        if name is None and only not in SUMMARIES:
            return match[0]
        if name and not (RESULTS / f"{name}.json").exists():
            return match[0]
        lines = table(load(name), only) if name else SUMMARIES[only]()
        return f"{match[0].splitlines()[0]}\n{lines}\n<!-- end -->"

    return MARKER.sub(block, text)


@dataclass
class Config:
    """Writes the tables and the figures; it has no flags."""


def main(config: Config) -> None:
    import draw

    draw.main()
    for readme in (ROOT / "README.md", RESULTS / "README.md"):
        text = render(cli.read_text(readme))
        with cli.replacing(readme) as part:
            part.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    cli.run(main, Config)
