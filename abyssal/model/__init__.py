"""The architecture of DeepSeek-V3 in plain PyTorch, and nothing else.

Shapes carry one letter a dimension, as suffixes of names and in docstrings:

    T  tokens in the batch          E  routed experts
    D  model width                  K  experts a token
    H  heads                        F  expert width
    C  latent rank                  S  sequences in the batch
    R  rotary width                 W  elements a token leaves behind in a layer's cache
    N  non-rotary width of a query or key head
    V  width of a value head

Tokens are always packed: one flat row `[T]`, with the boundaries of its sequences beside it (`packing.py`).
The model owns no state between calls: the cache is an argument (`cache.py`).
"""
