"""Write a table of generated ratings, for docs/user-as-task.md: no person gave any of them.

python scripts/generated_ratings.py <file.csv> [users=400] [seed=0]

A user has a mood and a taste, both standard normal; an item has 6 standard normal features. The
rating is 3 + mood / 2 + taste · features / 2 + noise / 2, from 1 to 5. Each user has rated 12 to 60
of 500 items.
"""

import csv
import sys
from pathlib import Path

import numpy as np

FEATURES = 6


def write(path: Path, users: int = 400, seed: int = 0) -> None:
    """Write the table."""
    rng = np.random.default_rng(seed)
    items = rng.normal(size=(500, FEATURES)).round(3)
    with path.open("w", newline="", encoding="utf-8") as stream:
        rows = csv.writer(stream)
        rows.writerow(["user", *(f"feature{number}" for number in range(FEATURES)), "rating"])
        for user in range(users):
            mood, taste = rng.normal(), rng.normal(size=FEATURES)
            own = items[rng.choice(len(items), rng.integers(12, 61), replace=False)]
            noise = rng.normal(size=len(own))
            ratings = (3 + (mood + own @ taste + noise) / 2).clip(1, 5).round(1)
            rows.writerows(
                [f"user{user:03}", *row, rating] for row, rating in zip(own, ratings, strict=True)
            )


if __name__ == "__main__":
    given = dict(word.partition("=")[::2] for word in sys.argv[2:])
    write(Path(sys.argv[1]), int(given.get("users", 400)), int(given.get("seed", 0)))
