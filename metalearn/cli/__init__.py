"""The command line: one file per command, each with HELP and main(args)."""
