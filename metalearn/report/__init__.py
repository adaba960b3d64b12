"""What people read: result files, tables, plots, statistics and Weights & Biases."""
