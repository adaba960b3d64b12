"""Atomic files, locks, signals, processes, downloads and errors; independent of the rest."""
