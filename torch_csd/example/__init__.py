"""The bundled example: a small trained Llama that finds in a long context what a question asks. Nothing is fetched."""
