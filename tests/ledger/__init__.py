"""A small Llama with written weights that reads any bytes: what goes in decides its answers, and nothing is drawn."""
