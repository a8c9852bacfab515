"""synth_task.py - tasks whose answer hides in the context, answered through selectors.

    tasks by name, or a JSONL file -> documents (tasks/) -> evaluate -> accuracy of each selector

Two protocols. *sparse* (default): question and answer go through the selection, so that a method
which evicts has to do so before it is asked. *prefill*: the question is read densely with the
context, as in most published tables, and only its last token and the answer go through the
selection.

A score is between 0 and 1, see tasks/document.py; how it comes about, tasks/evaluation.py.
Accuracies come with a 95 % interval: a bootstrap over documents and, where several butlers are
given, over these, which is where training seeds differ.

    python synth_task.py --selectors dense,oracle,butler,h2o --budgets 0.1,0.5
    python synth_task.py --task needle_noise,copy --context 1024,2048 --n 20
    python synth_task.py --data questions.jsonl        {"context", "question", "answer"} per line
"""

import json
from dataclasses import asdict, dataclass
from functools import partial

from baselines import NAMES
from beyond.offload import STORES, cache_kind
from butler import SHIPPED, Butler, fingerprint, load_for
from common.cli import DEVICE, flag, known, names, numbers, provenance, run
from common.errors import UsageError
from common.files import read_text, writable
from loading import tokenizer
from loading.fetch import butler_file, digest, resolve
from measure.intervals import accuracy, bootstrap, of_oracle
from model import Llama, check_device, fast_dtype
from tasks.document import Document
from tasks.evaluation import TASKS, Scores, check_budgets, evaluate, fits, task_documents


@dataclass
class Config:
    """Answers questions about a context through selectors at equal budgets."""

    model: str = flag(None, "folder, GGUF file or Hub id (default: SmolLM2-135M-Instruct)")
    butler: tuple = flag((), "files or Hub ids, comma-separated: their seeds are resampled "
                             "(default: the shipped one)", names)
    task: tuple = flag(("coreference",), f"comma-separated, of {', '.join(TASKS)}", names)
    data: str = flag(None, "instead of a task: JSONL file of context, question, answer")
    selectors: tuple = flag(NAMES, f"comma-separated, of {', '.join(NAMES)}", names)
    budgets: tuple = flag(("0.1",), "comma-separated fractions or counts of tokens attended", names)
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


# ---------------------------------------------------------------------------- documents


def read_data(path) -> list[Document]:
    """Lines {"context", "question", "answer"}, the answer one accepted string or a list of them.
    Raises UsageError with file and line for anything else."""
    documents = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            context, question, answers = (entry[k] for k in ("context", "question", "answer"))
        except (ValueError, RecursionError) as e:
            raise UsageError(f"{path}:{number}: not JSON ({e})") from None
        except (KeyError, TypeError) as e:
            raise UsageError(f"{path}:{number}: not an object with context, question and answer "
                             f"({e})") from None
        answers = [answers] if isinstance(answers, str) else answers
        if not (isinstance(context, str) and isinstance(question, str) and context and question
                and isinstance(answers, list) and answers
                and all(isinstance(a, str) and a.strip() for a in answers)):
            raise UsageError(f"{path}:{number}: context and question are texts, answer a text or a "
                             f"list of them, none empty")
        documents.append(Document(context, question, tuple(a.strip() for a in answers), "any", 64))
    if not documents:
        raise UsageError(f"{path}: no lines")
    return documents


# ---------------------------------------------------------------------------- the script


def main(config: Config) -> dict:
    tasks = check(config)
    path = resolve(config.model)
    tok = tokenizer.load(path)

    try:
        tasks = {name: make(count=tok.count) for name, make in tasks.items()}
    except ValueError as e:  # a dial out of range
        raise UsageError(str(e)) from None
    llama = Llama.from_pretrained(path, fast_dtype(config.device), config.device)
    tok.check(llama)
    butlers, dtype = [], str(llama.embed_tokens.weight.dtype)
    if "butler" in config.selectors:
        butlers = [load_for(llama, p) for p in config.butler or (SHIPPED,)]
    fits(llama, tasks, tok.count)
    identity = {k: v for k, v in asdict(config).items() if k != "out"}
    identity |= {k: v for k, v in provenance().items() if k != "command"}
    identity |= {"weights": str(path), "fingerprint": fingerprint(llama), "dtype": dtype}
    files = [f for f in (*config.butler, SHIPPED, config.data) if f]
    identity["files"] = [digest(butler_file(f)) for f in files]
    scores = Scores(config.out, identity)
    kind = cache_kind(config.offload, config.offload_dir, config.device)
    results, kept, selected = {}, {}, {}
    for name, documents in tasks.items():
        shares = {}
        table = evaluate(llama, tok, documents, config.selectors, config.budgets, butlers,
                         config.question, config.batch, scores, name, kind, shares,
                         drift=config.drift)
        results[name] = {s: {b: accuracy(runs) for b, runs in by.items()}
                         for s, by in table.items()}
        kept[name] = {s: {b: bootstrap(of_oracle(runs, *shares["oracle"][b]))
                          for b, runs in by.items()}
                      for s, by in shares.items()
                      if "oracle" in shares and s not in ("dense", "oracle")}
        selected[name] = sum(tok.count(d.question if config.question == "sparse" else "")
                             + (d.new_tokens or tok.count(d.answer)) for d in documents)
        selected[name] /= len(documents)
        for selector, by in results[name].items():
            for budget, m in by.items():
                print(f"{name:18s} {selector:8s} {budget:>5s}  {m['mean']:.3f}  "
                      f"[{m['low']:.3f}, {m['high']:.3f}]  n = {m['n']}")
        for selector, by in kept[name].items():
            for budget, m in by.items():
                print(f"{name:18s} {selector:8s} {budget:>5s}  keeps {m['mean']:.1%} of the "
                      f"oracle's attention  [{m['low']:.1%}, {m['high']:.1%}]")
        print(f"{name:18s} up to {selected[name]:.0f} tokens went through the selection",
              flush=True)
    return {"results": results, "kept of oracle": kept, "selected_tokens": selected,
            "dtype": dtype} | provenance()


def check(config: Config) -> dict:
    """What can be known to be wrong before anything slow starts -> {name: count -> documents}."""
    known("task", config.task, TASKS)
    known("selector", config.selectors, NAMES)
    if config.question not in ("sparse", "prefill"):
        raise UsageError(f"--question is sparse or prefill, not {config.question!r}")
    check_budgets(config.budgets)
    check_device(config.device)
    cache_kind(config.offload, config.offload_dir, config.device)
    for path in config.butler:
        Butler.load(path)
    if config.out is not None:
        writable(config.out)
    contexts = [int(c) for c in config.context] or [None]
    if config.data is not None:
        if config.context:
            raise UsageError("--context is the length of a task, --data has its own")
        documents = read_data(config.data)
        return {"data": lambda count: documents}
    return {task if len(contexts) == 1 else f"{task}@{context}":
            partial(task_documents, task, context, config.n, config.seeds,
                    referents=config.referents)
            for context in contexts for task in config.task}


if __name__ == "__main__":
    run(main, Config)
