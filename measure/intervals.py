"""measure/intervals.py - single scores in, a mean with its 95 % interval out.

    [[score of each document] of each run] --bootstrap--> {"mean", "low", "high", "n"}

    python -m measure.intervals        intervals of 20 and of 200 coin tosses
"""

import random


def bootstrap(runs: list[list[float]]) -> dict:
    """Mean of scores [[of each document] of each run] and its 95 % interval, from 2,000 draws: runs
    with replacement, then documents, the same for every run. n is the number of documents."""
    rng, n = random.Random(0), len(runs[0])
    means = []
    for _ in range(2000):
        chosen = rng.choices(range(n), k=n)
        drawn = rng.choices(runs, k=len(runs))
        means.append(sum(run[i] for run in drawn for i in chosen) / n / len(runs))
    means.sort()
    return {"mean": sum(map(sum, runs)) / n / len(runs), "low": means[50], "high": means[1949],
            "n": n}


def accuracy(runs: list[list[float]]) -> dict:
    """`bootstrap` of scores; where all are 0, or 1, there is nothing to draw from: there the bound
    is Clopper and Pearson's, what n failures, or successes, can still exclude."""
    m = bootstrap(runs)
    bound = 0.025 ** (1 / m["n"])
    if m["high"] == 0:
        m["high"] = 1 - bound
    elif m["low"] == 1:
        m["low"] = bound
    return m


def of_oracle(runs: list[list[float]], best: list[float]) -> list[list[float]]:
    """Shares of the attention kept, by document, as shares of what the oracle keeps."""
    return [[share / most for share, most in zip(run, best, strict=True)] for run in runs]


def through(function, interval: dict) -> dict:
    """A monotone function of a mean and its interval; n stays."""
    return {key: v if key == "n" else function(v) for key, v in interval.items()}


if __name__ == "__main__":
    for n in 20, 200:
        print(accuracy([[float(random.Random(i).random() < 0.5) for i in range(n)]]))
