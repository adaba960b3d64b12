"""`python -m metalearn` is the `metalearn` command."""

from metalearn.cli.main import main

main()
