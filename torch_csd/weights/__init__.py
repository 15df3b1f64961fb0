"""Tensors that are ranges of files: weights that stay in their safetensors files, and any other stored array.

Data flows one way: `files` finds out what is where, `layout` says which bytes a tensor is made of, `stream` brings them
into bounded memory (`staging`, `unit`) ahead of their use, for several threads at once if need be (`lockstep`);
`quantised` and `widening` compute with what is stored in less precision, `convert` makes such copies; `tensor` and
`functions` are what torch sees of it all. Knows nothing of transformers.
"""
