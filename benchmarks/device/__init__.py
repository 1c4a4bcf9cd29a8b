"""One command for the first minutes on a GPU: build, tests, race check, benchmarks, one file."""
