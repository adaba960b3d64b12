"""Few-shot methods, one per file; full references are in docs/algorithms."""
