"""From YAML and a command line to one checked configuration; imports no torch."""
