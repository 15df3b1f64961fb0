"""Tensors that are ranges of files: weights that stay in their safetensors files, and any other stored array.

`files` finds out what is where, `layout` says which bytes a tensor is made of, `stream` brings them into bounded memory
ahead of their use, `tensor` and `functions` are what torch sees of it. Knows nothing of transformers.
"""
