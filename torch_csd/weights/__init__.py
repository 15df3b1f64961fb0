"""Weights that lie on the drive, or quantised in memory, and linear layers that run on them."""
