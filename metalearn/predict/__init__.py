"""Labels for your own examples, and how far to trust them."""
