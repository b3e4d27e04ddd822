"""Rival methods, each from its published description, for the demo and the benchmarks (installed as loft_fast.peers)."""
