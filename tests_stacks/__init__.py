"""Tests against the real packages of other stacks, each in an environment of its own."""
