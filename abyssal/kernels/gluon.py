"""What Triton 3.6 and 3.7 call differently in Gluon."""

from triton.experimental.gluon import language as gl

# Waits for all threads of a program, or of a warp-specialised part of it.
thread_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
