"""Where the records of a cache lie beyond the device: host memory, pinned beside a GPU, or a file mapped into memory.

Owns the allocation and its alignment; which block lies where is the pool's business. A record has the same bytes in
every place, and kernels find it by its number counted from the first record on the device, which may lie outside of
that tensor: so `open_home` puts the first record a whole number of records away from it.
"""

import ctypes
import mmap
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import torch
from torch import Tensor

from duolocal.errors import MemoryLimitError

Outer = Literal["memory", "disk"]


@dataclass(frozen=True)
class Placement:
    """How much of the blocks may lie on the device, and where the others are.

    device_bytes: for records on the device and their tables; None for all of them. outer: where every block has its
    home where not all fit; "memory" is for a GPU, whose host has more, "disk" for a CPU. folder: for the file.
    """

    device_bytes: int | None = None
    outer: Outer = "memory"
    folder: Path | None = None


ON_DEVICE = Placement()


@dataclass(frozen=True)
class Home:
    """Records beyond the device: `records` uint8 [num_records, record_bytes], and the file they lie in, if any."""

    records: Tensor
    mapping: mmap.mmap | None = None
    file: BinaryIO | None = None

    def drop_from_memory(self) -> bool:
        """Write the file out and let go of its pages in memory, for a measurement; return whether that can be asked."""
        if self.mapping is None or self.file is None or not hasattr(os, "posix_fadvise"):
            return False
        self.mapping.flush()
        self.mapping.madvise(mmap.MADV_DONTNEED)
        os.posix_fadvise(self.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return True


def open_home(num_records: int, record_bytes: int, *, placement: Placement, beside: Tensor) -> Home:
    """Reserve records a whole number of records away from `beside`, uint8 [n, record_bytes] on the device.

    Raises MemoryLimitError where the disk has no room for the file. The file has no name: it is gone with the process.
    """
    assert placement.outer == "memory" or beside.device.type == "cpu"  # a GPU cannot read a file
    size = (num_records + 1) * record_bytes  # one more, for the alignment
    mapping = file = None
    if placement.outer == "disk":
        mapping, file = _map_file(size, placement.folder)
        memory = torch.frombuffer(mapping, dtype=torch.uint8)
    else:
        memory = torch.empty(size, dtype=torch.uint8, pin_memory=beside.device.type == "cuda")
    shift = (beside.data_ptr() - memory.data_ptr()) % record_bytes
    return Home(memory[shift : shift + num_records * record_bytes].view(num_records, record_bytes), mapping, file)


def _map_file(size: int, folder: Path | None) -> tuple[mmap.mmap, BinaryIO]:
    folder = Path(tempfile.gettempdir()) if folder is None else folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < size:
            raise OSError(f"{free / 2**30:.1f} GiB are free")
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # it lives as long as the mapping
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)  # a page that has no room on the disk kills the process
        else:
            file.truncate(size)
        return mmap.mmap(file.fileno(), size), file
    except OSError as error:
        raise MemoryLimitError(
            f"the KV cache needs a file of {size / 2**30:.1f} GiB in {folder}: {error.strerror or error}; make room "
            "there, set DUOLOCAL_CACHE to a folder on another disk, or use a smaller --context"
        ) from error


def madvise_address() -> int | None:
    """Return the address of the C library's madvise, by which compiled kernels ask for pages ahead; None without."""
    if not hasattr(mmap, "MADV_WILLNEED"):
        return None
    return ctypes.cast(ctypes.CDLL(None).madvise, ctypes.c_void_p).value
