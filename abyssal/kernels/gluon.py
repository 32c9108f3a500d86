"""What Triton 3.6 and 3.7 call differently in Gluon, and what Gluon has no name for."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Waits for all threads of a program, or of a warp-specialised part of it.
thread_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier


@gluon.jit
def wait_for_launch_before():
    """Of a programmatic dependent launch: until the launch before has ended and what it wrote is to be seen."""
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def let_next_launch_begin():
    """It may start while this one runs, and waits where it says so."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )
