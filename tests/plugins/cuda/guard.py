"""Tensors that end where memory ends: a kernel that reads past them ends the process."""

import ctypes
import mmap

import torch
from torch import Tensor

_LIBC = ctypes.CDLL(None, use_errno=True)
_ALIGNMENT = 16


def guarded(tensor: Tensor) -> Tensor:
    """A copy whose last 16-byte unit stands before a page that nobody may touch."""
    size = -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    view = (ctypes.c_char * len(memory)).from_buffer(memory)
    end = ctypes.addressof(view) + pages
    if _LIBC.mprotect(ctypes.c_void_p(end), ctypes.c_size_t(mmap.PAGESIZE), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=pages - size)
    return copy.view(tensor.shape).copy_(tensor)
