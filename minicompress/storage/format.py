"""What a file may hold: its codes, its types, its error."""

import torch
from torch import Tensor

from minicompress import codes, entropy
from minicompress.codes import State

MAGIC, PLAIN, COMPACT = b"MINC", 1, 2  # how the header is written

CODES = {
    c.__name__: c
    for c in (
        codes.Ints,
        codes.Affine,
        codes.Codebook,
        codes.Scaled,
        codes.Rotated,
        codes.Sparse,
        codes.Gaps,
        codes.Factors,
        codes.Sum,
        codes.Hashed,
        codes.View,
        entropy.Huffman,
        entropy.Rans,
        entropy.Contextual,
    )
}

DTYPES = {
    "f4": torch.float32,
    "f2": torch.float16,
    "bf": torch.bfloat16,
    "f8": torch.float64,
    "b1": torch.bool,
    "u1": torch.uint8,
    "i1": torch.int8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
}
TAGS = {dtype: tag for tag, dtype in DTYPES.items()}


class StorageError(ValueError):
    """A file that cannot be read; the message says what is wrong with it."""


def check_names(state: State, have: dict[str, Tensor], error) -> None:
    missing = [n for n in have if n not in state]
    extra = [n for n in state if n not in have]
    if missing or extra:
        raise error(
            f"the names do not match the model: missing {missing[:3]}, "
            f"unexpected {extra[:3]}"
        )
    for name, w in have.items():
        if codes.shape(state[name]) != tuple(w.shape):
            raise error(
                f"{name}: shape {codes.shape(state[name])}, but the model "
                f"has {tuple(w.shape)}"
            )
