"""Turn YAML and a command line into one checked configuration, without importing torch."""
