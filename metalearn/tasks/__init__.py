"""Define tasks: types, input stores, episode samplers, losses and metrics."""
