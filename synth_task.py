"""synth_task.py - tasks whose answer hides in the context, answered through selectors.

    tasks by name, or a JSONL file -> documents (tasks/) -> evaluate -> accuracy of each selector

Two protocols. *sparse* (default): question and answer go through the selection, so that a method
which evicts has to do so before it is asked. *prefill*: the question is read densely with the
context, as in most published tables, and only its last token and the answer go through the
selection.

A score is between 0 and 1, see tasks/document.py; how it comes about, tasks/evaluation.py. With
--data (tasks/longbench.py) there is also the loss of the first accepted answer, in nats a token,
and how much of it a selection adds, which tells something where scores are near zero; each data set
has results of its own, several have a mean.

Means come with a 95 % interval: a bootstrap over documents and, where several butlers are given,
over these, which is where training seeds differ.

    python synth_task.py --selectors dense,oracle,butler,h2o --budgets 0.1,0.5
    python synth_task.py --task needle_noise,copy --context 1024,2048 --n 20
    python synth_task.py --data questions.jsonl        your own, LongBench's or RULER's lines
"""

from dataclasses import asdict, dataclass

from baselines import NAMES
from beyond.engine import found, opened
from beyond.offload import STORES, cache_kind
from butler import SHIPPED, Butler, fingerprint, load_for
from common.cli import DEVICE, flag, known, names, numbers, provenance, run
from common.errors import UsageError
from common.files import writable
from loading.fetch import butler_file, digest
from measure.intervals import above_dense, accuracy, bootstrap, each, of_oracle
from model import check_device
from selection import Selector
from tasks.evaluation import TASKS, Scores, evaluate, fits, task_documents
from tasks.longbench import cut, read_data


@dataclass
class Config:
    """Answers questions about a context through selectors at equal budgets."""

    model: str = flag(None, "folder, GGUF file or Hub id (default: SmolLM2-135M-Instruct)")
    engine: str = flag("own", "what runs the model: own, for a Llama, or transformers")
    butler: tuple = flag((), "files or Hub ids, comma-separated: their seeds are resampled "
                             "(default: the shipped one)", names)
    task: tuple = flag(("coreference",), f"comma-separated, of {', '.join(TASKS)}", names)
    data: str = flag(None, "instead of a task: JSONL file, your own, LongBench's or RULER's")
    selectors: tuple = flag(NAMES, f"comma-separated, of {', '.join(NAMES)}", names)
    budgets: tuple = flag(("0.1",), "comma-separated fractions or counts of tokens attended",
                          numbers(kind=float))
    drift: float = flag(0.0, "a butler's choice is kept until its query has turned by more than "
                             "this (1 - cosine, 16 steps at most)", most=2)
    n: int = flag(100, "documents for each seed", least=1)
    seeds: tuple = flag(("0",), "comma-separated seeds of the documents", numbers())
    referents: int = flag(1, "coreference: places introduced in a document", least=1, most=8)
    context: tuple = flag((), "comma-separated tokens of context, question and answer "
                              "(default: about 355 for coreference, else 1024)", numbers(1))
    question: str = flag("sparse", "sparse: question and answer go through the selection; "
                                   "prefill: only the answer does")
    batch: int = flag(4, "documents at a time", least=1)
    out: str = flag(None, "JSONL file of single scores; an interrupted run goes on from it")
    offload: str = flag("none", f"where keys and values live, of {', '.join(STORES)}")
    offload_dir: str = flag(None, "disk: folder of the file (default: /var/tmp)")
    device: str = flag(DEVICE, "cpu or cuda")


def main(config: Config) -> dict:
    data = check(config)
    path, tok = found(config)
    tasks = data or named(config, tok.count)
    llama, tok = opened(config, place=(path, tok))
    dtype = str(llama.embed_tokens.weight.dtype)
    butlers = [load_for(llama, p) for p in config.butler or (SHIPPED,)
               if "butler" in config.selectors]
    tasks = {name: [cut(tok, d, llama.config.context) for d in documents]
             for name, documents in tasks.items()}
    fits(llama, tasks, tok.count)
    weights = {"weights": str(path), "fingerprint": fingerprint(llama), "dtype": dtype}
    scores = Scores(config.out, identity(config) | weights)
    kind = cache_kind(config.offload, config.offload_dir, config.device)
    report = {"results": {}, "kept of oracle": {}, "selected_tokens": {},
              "question": config.question, "dtype": dtype}
    if data:
        report |= {"loss": {}, "loss above dense": {}}
    tables, losses = {}, {}

    def tell(what, name, table, form):
        """Reports {selector: {budget: interval}} of a task, a line for each."""
        report[what][name] = table
        for selector, by in table.items():
            for budget, m in by.items():
                print(f"{name:20s} {selector:8s} {budget:>5s}  {form.format(**m)}")

    def means(name, *tasks):
        """The scores of a task, or the means of several, and the losses of their references."""
        tell("results", name, each(accuracy, *(tables[task] for task in tasks)),
             "{mean:.3f}  [{low:.3f}, {high:.3f}]  n = {n}")
        if data:
            loss = [losses[task] for task in tasks]
            tell("loss", name, each(bootstrap, *loss), "loss {mean:.4f}  [{low:.4f}, {high:.4f}]")
            tell("loss above dense", name, each(bootstrap, *map(above_dense, loss)),
                 "loss {mean:+.4f} above dense  [{low:+.4f}, {high:+.4f}]")

    for name, documents in tasks.items():
        shares, losses[name] = {}, {}
        tables[name] = evaluate(llama, tok, documents, config.selectors, config.budgets, butlers,
                                config.question, config.batch, scores, name, kind, shares,
                                losses[name] if data else None, drift=config.drift)
        means(name, name)
        tell("kept of oracle", name,
             {s: {b: bootstrap(of_oracle(runs, *shares["oracle"][b])) for b, runs in by.items()}
              for s, by in shares.items() if "oracle" in shares and s not in ("dense", "oracle")},
             "keeps {mean:.1%} of the oracle's attention  [{low:.1%}, {high:.1%}]")
        sizes = [tok.count(d.question if config.question == "sparse" else "")
                 + (d.new_tokens or tok.count(d.answer)) for d in documents]
        report["selected_tokens"][name] = size = sum(sizes) / len(sizes)
        print(f"{name:20s} up to {size:.0f} tokens went through the selection "
              f"(--question {config.question})", flush=True)
    if data and len(tasks) > 1:
        means("mean", *tasks)
    return report | provenance()


def identity(config) -> dict:
    """What single scores belong to, beside the weights."""
    files = [digest(butler_file(f)) for f in (*config.butler, SHIPPED, config.data) if f]
    settings = asdict(config) | provenance() | {"files": files}
    return {name: v for name, v in settings.items() if name not in ("out", "command")}


def check(config: Config) -> dict | None:
    """What can be known to be wrong before anything slow starts -> the documents of --data."""
    known("task", config.task, TASKS)
    known("selector", config.selectors, NAMES)
    if config.question not in ("sparse", "prefill"):
        raise UsageError(f"--question is sparse or prefill, not {config.question!r}")
    for budget in config.budgets:
        Selector(float(budget))
    check_device(config.device)
    cache_kind(config.offload, config.offload_dir, config.device)
    for path in config.butler:
        Butler.load(path)
    if config.out is not None:
        writable(config.out)
    if config.data is not None:
        for name in ("task", "context", "n", "seeds", "referents"):
            if getattr(config, name) != getattr(Config, name):
                raise UsageError(f"--{name} is for tasks by name, --data has its own documents")
        return read_data(config.data)
    return None


def named(config: Config, count) -> dict:
    """{task, with its context where there are several: documents}; count(text) -> tokens."""
    contexts = [int(c) for c in config.context] or [None]
    return {task if len(contexts) == 1 else f"{task}@{context}":
            task_documents(task, context, config.n, config.seeds, count, config.referents)
            for context in contexts for task in config.task}


if __name__ == "__main__":
    run(main, Config)
