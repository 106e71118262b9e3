"""Arrays -> the bytes of npy members."""

import io
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=1024)
def npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """What an npy file of an array in C order begins with."""
    stream = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, fields)
    return stream.getvalue()


def npy_parts(array: np.ndarray) -> tuple[bytes, memoryview]:
    """An npy file's bytes, header and values: a view of the array where that is in C order."""
    values = np.ascontiguousarray(array)
    return npy_header(array.shape, array.dtype), values.reshape(-1).view(np.uint8).data


def npy_bytes(array: np.ndarray) -> bytes:
    """An npy file's bytes, in C order."""
    return b"".join(npy_parts(array))
