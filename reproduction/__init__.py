"""Reruns the paper: lists of runs, the sweep that executes them, and what is made from their results."""
