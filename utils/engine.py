"""What makes training fast beside the network: memory that is kept."""

import ctypes
import os
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
NEVER = -1


def set_up(device: torch.device) -> None:
    """Set this process up for training on a device; a second call changes nothing.

    On a CPU glibc gives the memory of every tensor of 32 MiB or more back to the system, and the next step waits for
    the same pages to be mapped and cleared again: at batch 128 that is half the step. Here memory that was used is kept
    until the process ends. Where the environment holds settings of malloc's, they stay.

    On a GPU cuDNN tries its algorithms on the first step and keeps the fastest.
    """
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    elif sys.platform == "linux" and not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # glibc's
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_TRIM_THRESHOLD, NEVER)
