"""One file an operation: the PyTorch reference first, the fast path beside it, the same signature.

A path is chosen by what the tensors are (device, dtype, shapes) and can be forced by name for a test.
"""
