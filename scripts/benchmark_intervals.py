"""Simulate how often the 95% interval over episodes contains the true mean.

python scripts/benchmark_intervals.py

Writes benchmarks/intervals.json and benchmarks/intervals.md: the coverage over 10,000 runs of 600
episodes. An episode has 75 or 5 queries; each is correct with a probability that is drawn for the
episode from a Beta distribution.
"""

import json
from pathlib import Path

import torch

from metalearn.report.environment import describe_environment
from metalearn.report.stats import estimate

_OUT = Path(__file__).parent.parent / "benchmarks"
_RUNS, _EPISODES, _SEED = 10_000, 600, 0
#: Mean accuracy, concentration of the Beta distribution (small: episodes differ a lot), number of
#: queries per episode.
_CASES = [
    (0.50, 20.0, 75),
    (0.95, 20.0, 75),
    (0.98, 20.0, 75),
    (0.98, 20.0, 5),
    (0.99, 100.0, 75),
    (0.20, 200.0, 75),
]


def coverage(
    mean: float, concentration: float, queries: int, generator: torch.Generator
) -> tuple[float, float]:
    """Return the share of runs whose interval contains `mean`, and the mean half-width."""
    alpha, beta = (torch.full((_EPISODES,), share * concentration) for share in (mean, 1 - mean))
    covered = width = 0.0
    for _ in range(_RUNS):
        gammas = [
            torch._standard_gamma(parameter.double(), generator) for parameter in (alpha, beta)
        ]
        share = gammas[0] / (gammas[0] + gammas[1])
        scores = torch.binomial(torch.full_like(share, queries), share, generator) / queries
        interval = estimate(scores)
        covered += abs(interval.mean - mean) <= interval.ci95
        width += interval.ci95
    return covered / _RUNS, width / _RUNS


def main() -> None:
    """Simulate every case and write both files."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(_SEED)
    rows = []
    for mean, concentration, queries in _CASES:
        covered, width = coverage(mean, concentration, queries, generator)
        rows.append(
            {
                "mean": mean,
                "concentration": concentration,
                "queries": queries,
                "coverage": covered,
                "half_width": width,
            }
        )
    environment = describe_environment("cpu")
    content = {
        "runs": _RUNS,
        "episodes": _EPISODES,
        "seed": _SEED,
        "environment": environment,
        "rows": rows,
    }
    _OUT.mkdir(exist_ok=True)
    (_OUT / "intervals.json").write_text(json.dumps(content, indent=1) + "\n")
    lines = [
        "# Coverage of the 95% interval over episodes",
        "",
        f"`make benchmark-intervals`: {_RUNS:,} simulated runs of {_EPISODES} episodes each, "
        f"seed {_SEED},",
        f"commit {environment['commit']}, torch {environment['versions']['torch']}.",
        "Each query of an episode is correct with a probability drawn from a Beta distribution",
        "(mean, concentration).",
        "With 10,000 runs the coverage itself is known to about ±0.4 points.",
        "",
        "| mean accuracy | concentration | queries per episode | mean half-width | coverage |",
        "|---|---|---|---|---|",
        *(
            f"| {row['mean']:.0%} | {row['concentration']:g} | {row['queries']} | "
            f"{row['half_width']:.3%} | {row['coverage']:.2%} |"
            for row in rows
        ),
    ]
    (_OUT / "intervals.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
