"""Benchmarks: each is a module that prints a table and, as its last line, one JSON document."""
