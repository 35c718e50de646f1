"""Conformance: the hot path against test suites, other implementations and hostile bytes."""
