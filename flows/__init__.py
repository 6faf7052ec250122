"""Continuous normalising flows: networks, their divergences, and models of densities; `flow.py` trains them."""
