"""safetensors dtype codes: bytes per element, and which of them can be averaged."""

from __future__ import annotations

from mergekit_lr.lazy import torch

ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "C64": 8,
}
"""Bytes per element of every dtype that is read. Sub-byte dtypes are refused by name."""

AVERAGED = frozenset({"F16", "BF16", "F32", "F64"})
"""Dtypes that methods are applied to. Everything else is copied from the reference model by rule."""

RECIPE_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}

_TORCH = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
    "C64": "complex64",
}


def torch_dtype(code: str) -> torch.dtype:
    """The torch dtype of a safetensors code."""
    dtype: torch.dtype = getattr(torch, _TORCH[code])
    return dtype


def dtype_code(dtype: torch.dtype) -> str:
    """The safetensors code of a torch dtype.

    Raises:
        ValueError: safetensors has none.
    """
    name = str(dtype).removeprefix("torch.")
    for code, known in _TORCH.items():
        if known == name:
            return code
    raise ValueError(f"{dtype} cannot be stored in safetensors")


OVERFLOWS_AT = {"F16": 65520.0, "BF16": 3.3961775292304601e38, "F32": float("inf"), "F64": float("inf")}
"""Smallest magnitude that rounds to infinity in the last cast (arithmetic is fp32, so F64 cannot overflow)."""
