"""Archaic phrases are not used in code, configuration, docs and README."""

import re
from pathlib import Path

_ROOT = Path(__file__).parent.parent
_PHRASES = [
    r"gone on with", r"\bgo(es)? on with", r"going on with", r"\blies there", r"\bstands? there",
    r"as one never", r"wherever (that|its)\b", r"not to be had", r"what was saved before",
    r"\banother [a-z]+ than\b", r"\bone's own", r"\bmended?\b", r"\btorn\b", r"so many (of|inner)",
    r"\banew\b", r"\bbesides\b", r"\bis to (hand|be had)",
    r"\bwants? (one|a|an|the|to be) (?=[a-z])", r"\btold (?=what|which|so)", r"of a kind of",
    r"\basks? for what",
]  # fmt: skip
_FILES = sorted(
    path
    for pattern in (
        "metalearn/**/*.py", "scripts/*.py", "tests/**/*.py", "conf/**/*.yaml", "docs/**/*.md",
        "docs/*.ipynb", "*.md", "Makefile", ".ci/run", "benchmarks/*.md",
    )
    for path in _ROOT.glob(pattern)
    if path != Path(__file__)
)  # fmt: skip


def test_no_archaic_phrases():
    found = [
        f"{path.relative_to(_ROOT)}:{text[: match.start()].count(chr(10)) + 1}: {match[0]}"
        for path in _FILES
        for text in (path.read_text(),)
        for phrase in _PHRASES
        for match in re.finditer(phrase, text, re.IGNORECASE)
    ]
    assert not found
