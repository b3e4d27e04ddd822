"""Rival methods, each from its published description, for demo and benchmarks (installed as loft_fast.peers)."""
