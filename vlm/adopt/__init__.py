"""`vlm adopt`: a project for an encoder and a language model that were never put together before.

Everything is found on shapes and text files; no weight is read. What needs weights is proven by `vlm prove` on the
project's trial.
"""
