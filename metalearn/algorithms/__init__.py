"""Few-shot methods: one file a family, each two pure functions of one task and a loss."""
