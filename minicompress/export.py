"""Write a compressed model in the formats of other programs.

What they read is dense: a decoded weight takes its full 32 bits again.  The
small file is the one of `storage`; these are for running the model elsewhere.
"""

import copy
import os

import torch
from torch import nn

from . import codes
from .codes import State


def decoded(model: nn.Module, state: State | None = None) -> nn.Module:
    """Return a copy of `model` that holds the decoded weights of `state`.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    state : dict, optional
        {name: Tensor or Code}; by default the model's own tensors.
    """
    model = copy.deepcopy(model)
    if state is not None:
        model.load_state_dict(codes.decode(state))
    return model.eval()


def to_state_dict(
    path: str | os.PathLike, model: nn.Module, state: State | None = None
) -> int:
    """Write a plain PyTorch state_dict and return its length in bytes.

    Parameters
    ----------
    path : path
        ``torch.load(path, weights_only=True)`` reads it.
    model : nn.Module
        Supplies names and structure.
    state : dict, optional
        {name: Tensor or Code}; by default the model's own tensors.
    """
    torch.save(decoded(model, state).state_dict(), path)
    return os.path.getsize(path)


def to_safetensors(
    path: str | os.PathLike, model: nn.Module, state: State | None = None
) -> int:
    """Write a safetensors file and return its length in bytes.

    The format has no tied tensors: each name gets its own copy.  The
    parameters are those of `to_state_dict`; needs the package safetensors.
    """
    from safetensors.torch import save_file

    tensors = decoded(model, state).state_dict()
    save_file({n: t.clone().contiguous() for n, t in tensors.items()}, path)
    return os.path.getsize(path)


def to_onnx(
    path: str | os.PathLike,
    model: nn.Module,
    example: tuple,
    state: State | None = None,
) -> int:
    """Write an ONNX graph and return its length in bytes.

    Parameters
    ----------
    path : path
        Where to write; the weights lie in the same file.
    model : nn.Module
        Any module that `torch.onnx.export` can trace.
    example : tuple
        Inputs of a forward pass; their first dimension becomes the batch
        and may have any size later.
    state : dict, optional
        {name: Tensor or Code}; by default the model's own tensors.

    Needs the packages onnx and onnxscript.
    """
    batch = torch.export.Dim("batch")
    torch.onnx.export(
        decoded(model, state),
        example,
        os.fspath(path),
        dynamo=True,
        external_data=False,
        verbose=False,
        dynamic_shapes=tuple({0: batch} for _ in example),
    )
    return os.path.getsize(path)
