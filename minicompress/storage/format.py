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


# What a compact header may refer back to, frequent words last.  A part of the
# format: to change a letter is to lose all compact files.
WORDS = (  # noqa: UP012
    '{"BatchNorm2d","LayerNorm","Embedding","LM","heads":,"layers":,"width":,'
    '"vocab":,"context":,"ResNet","Hashed","Rotated","Sum","Scaled","Factors",'
    '"Gaps","Rans","Huffman","Affine","f4":[],"f8":[],"bf":[],"i1":[],"i4":[],'
    '"type":"f2","types":{"meta":{"seed":"Kept",{"numbers":[0,1,2],"Sequential"'
    ',{"layers":{"features.conv.norm.pool.head.block.0":["Conv2d",{"in_channels'
    '":1,"out_channels":16,"kernel_size":3,"stride":2,"padding":1,"groups":8,"b'
    'ias":false}],"layers.1":["Linear",{"in_features":64,"out_features":10}],"'
    'running_mean":"running_var":"num_batches_tracked":{"model":["CNN",{"channe'
    'ls":[8,16,32,64],"classes":36,"inputs":1}],"state":{"convs.0.weight":"norm'
    's.0.weight":"norms.0.bias":"head.weight":{"model":["LeNet5",{"classes":10}'
    '],"state":{"conv1.weight":"conv1.bias":"conv2.weight":"conv2.bias":"fc1.we'
    'ight":"fc1.bias":"fc2.weight":"fc2.bias":{"model":["MLP",{"widths":[64,32,'
    '784,300,100,10]}],"state":{"layers.0.weight":["Sparse",{"b1":[["Ints",["Vi'
    'ew",["Codebook",["Contextual",{"u1":[123]},3,[300,28,28]],{"f2":[5]}],[300'
    ',784]],"layers.0.bias":["Codebook",["Contextual",{"u1":[45]},3,[300]],{"f2'
    '":[8]}],"layers.1.weight":["Codebook",["Contextual",{"u1":[67]},3,[100,300'
    ']],{"f2":[5]}],"layers.1.bias":{"f2":[100]},"layers.2.weight":["Codebook",'
    '["Contextual",{"u1":[89]},4,[10,100]],{"f2":[9]}],"layers.2.bias":{"f2":[1'
    "0]}}}"
).encode()


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
