"""The bundled example: a small Llama whose answers show whether its KV cache is right. Nothing is fetched."""
