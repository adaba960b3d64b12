"""Atomic files, locks, signals, processes, downloads and errors; imports nothing else of metalearn."""
