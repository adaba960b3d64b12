"""Few-shot methods, one file per family: two pure functions of one task, and a loss."""
