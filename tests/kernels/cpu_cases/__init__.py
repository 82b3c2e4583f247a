"""Inputs and launches of vLLM's V2 kernels, run once with Triton and once with fall-backs.

A case is a function of a random generator that calls one of vLLM's launchers and
returns every tensor it may have written. ``run.py`` executes all of them in one
process; the two halves differ in nothing but ``TRITON_INTERPRET``.
"""
