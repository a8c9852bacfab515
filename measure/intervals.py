"""measure/intervals.py - single scores in, a mean with its 95 % interval out.

    [[score of each document] of each run], a task or more --bootstrap--> {"mean", "low", ...}

    python -m measure.intervals        intervals of 20 and of 200 coin tosses
"""

import random


def bootstrap(*tasks: list[list[float]]) -> dict:
    """Mean of scores [[of each document] of each run] and its 95 % interval, from 2,000 draws: runs
    with replacement, then documents, the same for every run. Of several tasks the mean of their
    means, each with documents of its own. n is the number of documents."""
    rng, runs, sizes = random.Random(0), range(len(tasks[0])), [len(task[0]) for task in tasks]

    def mean(drawn, chosen):
        means = [sum(task[r][i] for r in drawn for i in some) / len(some)
                 for task, some in zip(tasks, chosen, strict=True)]
        return sum(means) / len(drawn) / len(tasks)

    means = []
    for _ in range(2000):
        chosen = [rng.choices(range(n), k=n) for n in sizes]
        means.append(mean(rng.choices(runs, k=len(runs)), chosen))
    means.sort()
    return {"mean": mean(runs, map(range, sizes)), "low": means[50], "high": means[1949],
            "n": sum(sizes)}


def accuracy(*tasks: list[list[float]]) -> dict:
    """`bootstrap` of scores; where all are 0, or 1, there is nothing to draw from: there the bound
    is Clopper and Pearson's, what n failures, or successes, can still exclude."""
    m = bootstrap(*tasks)
    bound = 0.025 ** (1 / m["n"])
    if m["high"] == 0:
        m["high"] = 1 - bound
    elif m["low"] == 1:
        m["low"] = bound
    return m


def of_oracle(runs: list[list[float]], best: list[float]) -> list[list[float]]:
    """Shares of the attention kept, by document, as shares of what the oracle keeps."""
    return [[share / most for share, most in zip(run, best, strict=True)] for run in runs]


def above_dense(losses: dict) -> dict:
    """{selector: {budget: runs}} -> the same less the dense loss of the same document; empty where
    nothing was dense."""
    dense = losses.get("dense", {}).get("1.0", [()])[0]
    return {name: {b: [[a - d for a, d in zip(run, dense, strict=True)] for run in runs]
                   for b, runs in by.items()}
            for name, by in losses.items() if dense and name != "dense"}


def each(function, *tables: dict) -> dict:
    """Tables {selector: {budget: runs}}, one a task -> {selector: {budget: function(*runs)}}"""
    return {name: {b: function(*(table[name][b] for table in tables)) for b in by}
            for name, by in tables[0].items()}


def through(function, interval: dict) -> dict:
    """A monotone function of a mean and its interval; n stays."""
    return {key: v if key == "n" else function(v) for key, v in interval.items()}


if __name__ == "__main__":
    for n in 20, 200:
        print(accuracy([[float(random.Random(i).random() < 0.5) for i in range(n)]]))
