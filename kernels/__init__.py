"""Triton kernels and their launchers (installed as loft_fast.kernels)."""
