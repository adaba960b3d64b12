"""The page of `benchmark_speed.py`."""

from collections.abc import Callable
from typing import Any

from speed_rivals import PACKAGES, PLAIN

#: Relative error from which a gradient is called wrong; a ReLU that flips makes about 1e-3.
_WRONG = 2e-2
_AUTO = ("auto", "auto, 1 thread", "no compiler", "no compiler, 1 thread")
_VARIANTS = (*PLAIN, "loop", "vmap", "mixed", *_AUTO, *PACKAGES)


def lines(content: dict[str, Any]) -> list[str]:
    """Return the lines of the Markdown file."""
    environment, rows = content["environment"], content["rows"]
    commits = ", ".join(sorted({row.get("commit", environment["commit"]) for row in rows}))
    each = [variant for row in rows for variant in row["is"].values()]
    used, discarded = (sum(one[name] for one in each) for name in ("samples", "discarded"))
    page = [
        "# Training speed",
        "",
        "`make benchmark-speed` (`scripts/benchmark_speed.py`). "
        f"Commits {commits} (of each row in the JSON), {environment['hardware']}, torch "
        f"{environment['versions']['torch']}, seed 0, dataset glyphs unless CIFAR-FS is named.",
        "Conv4-64; MAML and its variants with stride 2 and spatial mean, on CIFAR-FS 32 filters "
        "with pooling. `auto` is what the engine picks, `no compiler` what it picks where there is "
        "no C compiler.",
        f"Samples alternate; {discarded} of {used + discarded} had a busy neighbour and were "
        "discarded. \\* fewer than three quiet ones: all were used.",
        "",
        "## Tasks per second: median (slowest to fastest)",
        "",
        f"| case | {' | '.join(_VARIANTS)} | auto picks |",
        "|---" * (len(_VARIANTS) + 2) + "|",
    ]
    for row in rows:
        engine = row["engine"]
        page.append(_row(row, _speed) + f" {engine['strategy']}, {engine['convolution']} |")
    page += [
        "",
        "## Times as fast as the plain loop, by the clock / by CPU time",
        "",
        "Each with one thread or with all, whichever is better by that measure.",
        "",
        "| case | auto | no compiler |",
        "|---|---|---|",
    ]
    for row in rows:
        cells = [
            "{:.2f} / {:.2f}".format(*speedups(row["is"], name)) if name in row["is"] else ""
            for name in ("auto", "no compiler")
        ]
        page.append(f"| {row['case']} | {' | '.join(cells)} |")
    page += ["", "## CPU time of a task in ms", "", *_head()]
    page += [_row(row, lambda one: f"{one['cpu_ms']:.2f}") for row in rows]
    page += [
        "",
        "## Error of the meta-gradient against float64, relative, over all parameters",
        "",
        f"An error above {_WRONG:g} is a wrong gradient; single ReLUs that flip make about 1e-3.",
        "",
        *_head(),
    ]
    page += [_row(row, _error) for row in rows]
    if content["earlier"]:
        page += [
            "",
            f"## Earlier, at commit {content['earlier']['commit']}: speed relative to the plain "
            "loop",
            "",
            "| case | higher | torchopt |",
            "|---|---|---|",
        ]
        page += [
            f"| {name} | {ratios['higher']:.2f} | {ratios['torchopt']:.2f} |"
            for name, ratios in content["earlier"]["rows"].items()
        ]
    return page + _rest(content) if "environment_of_the_rest" in content else page


def _head() -> list[str]:
    return [f"| case | {' | '.join(_VARIANTS)} |", "|---" * (len(_VARIANTS) + 1) + "|"]


def _row(row: dict[str, Any], cell: Callable[[dict[str, Any]], str]) -> str:
    cells = [cell(row["is"][name]) if name in row["is"] else "" for name in _VARIANTS]
    return f"| {row['case']} | {' | '.join(cells)} |"


def _speed(one: dict[str, Any]) -> str:
    noisy = "\\*" if one["is_noisy"] else ""
    wrong = ", wrong gradient" if one["error"] > _WRONG else ""
    spread = f"({one['slowest']:.1f} to {one['fastest']:.1f})"
    return f"{one['tasks_per_second']:.1f}{noisy} {spread}{wrong}"


def _error(one: dict[str, Any]) -> str:
    return f"**{one['error']:.1e}**" if one["error"] > _WRONG else f"{one['error']:.1e}"


def _rest(content: dict[str, Any]) -> list[str]:
    lines = ["", f"## The rest, at commit {content['environment_of_the_rest']['commit']}", ""]
    if "operators" in content:
        lines += [
            "Operators on the second block of Conv4-64 (64 filters, 14 x 14, stride 2 unless "
            "stated), 16 tasks of 10 images, one core, CPU time. GFLOP/s count all products of the "
            "definition, with the padding and those that tiles save.",
            "",
            "| operator | in C, ms | in torch, ms | GFLOP/s of the faster |",
            "|---|---|---|---|",
        ]
        for row in content["operators"]:
            times = [row[kind] for kind in ("c", "torch") if kind in row]
            rate = f"{row['flops'] / min(times) / 1e6:.0f}" if row["flops"] else ""
            in_c = f"{row['c']:.2f}" if "c" in row else ""
            lines.append(f"| {row['operator']} | {in_c} | {row['torch']:.2f} | {rate} |")
        lines.append("")
    return [
        *lines,
        f"- {content['test_episodes']:,} test episodes of MAML, 5w1s, 15 queries: "
        f"{content['test_seconds']:.1f} s",
        f"- from the command to the end of the first step, with cached data: "
        f"{content['first_step_seconds']:.1f} s",
        f"- share of a meta-step (MAML, 8 tasks, 5 queries) spent on sampling tasks and on the "
        f"optimiser: {content['share_outside_model']:.1%}",
        "- memory of one meta-step of MAML, 5 queries: "
        + "; ".join(
            f"{one['inner_steps']} inner steps, {one['meta_batch']} tasks"
            f"{', rematerialised' if one['rematerialise'] else ''} {one['mib']:.0f} MiB"
            for one in content["memory"]
        ),
    ]


def speedups(variants: dict[str, dict[str, Any]], name: str) -> tuple[float, float]:
    """Return how many times as fast as the plain loop `name` is, by wall and by CPU time.

    Of each, that with one thread counts if it is the better one.
    """
    plain, own = (
        [variants[one] for one in (first, f"{first}, 1 thread") if one in variants]
        for first in ("plain", name)
    )
    fastest = [max(one["tasks_per_second"] for one in each) for each in (own, plain)]
    cheapest = [min(one["cpu_ms"] for one in each) for each in (plain, own)]
    return fastest[0] / fastest[1], cheapest[0] / cheapest[1]
