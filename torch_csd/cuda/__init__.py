"""The GPU path: pages packed on the card, moved between card and drive, and attended to there.

Imported only when tokens on a CUDA device meet a store; importing it loads neither CuPy nor kvikio.
"""
