"""One sentence, instead of `Bus error`, when a file that is mapped into memory loses its bytes.

Touching a page that a truncated file no longer has, or that its disk cannot give, raises SIGBUS in
whichever thread decodes there. Python's own handlers cannot help: they wait for the interpreter's
next instruction, which never comes, and faulthandler prints stacks. A parent process that waits and
reports would see every Ctrl-C and SIGTERM twice or not at all, could be killed without its child,
and torchrun is such a parent already. So the handler is four machine instructions that call
write and _exit, which POSIX allows in a handler. llvmlite, which numba brings, makes them in a few
milliseconds; no C compiler is needed.
"""

import ctypes
import signal
import sys
from typing import Any

import llvmlite.binding as llvm

_HANDLER = """
declare i64 @write(i32, ptr, i64)
declare void @_exit(i32)
define void @handler(i32 %number) {{
  %written = call i64 @write(i32 2, ptr inttoptr (i64 {address} to ptr), i64 {length})
  call void @_exit(i32 1)
  ret void
}}
"""
_kept: list[Any] = []  # code and message, for as long as the process may need them


def explain_bus_error(*paths: str) -> None:
    """From now on SIGBUS says in a sentence that one of the files `paths` lost its bytes, and ends
    the process with status 1."""
    sentence = (
        f"{' or '.join(paths)} was truncated, or its disk failed, while it was read: once the file "
        f"is whole again, --resume auto goes on"
    )
    start = "\n" if sys.stderr.isatty() else ""  # a progress bar's line is not over
    message = f"{start}error: {sentence}\n".encode(errors="backslashreplace")
    buffer = ctypes.create_string_buffer(message)
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    module = llvm.parse_assembly(
        _HANDLER.format(address=ctypes.addressof(buffer), length=len(message))
    )
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    _kept.extend((buffer, engine))
    install = ctypes.CDLL(None).signal
    install.argtypes, install.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    install(int(signal.SIGBUS), engine.get_function_address("handler"))
