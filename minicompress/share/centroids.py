"""Train the shared values: who shares is settled, what they share is not.

A weight is looked up, w' = c[a], so that the gradient of a centroid is the
sum over its members, dL/dc_k = Σ over a_i = k of dL/dw_i: what autograd does
with an index.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from .. import codes, through


def cluster(model: nn.Module, state: codes.State) -> nn.Module:
    """Compute weights from centroids from now on, and train those.

    Which weights share a centroid stays as it is, and so do zeros of a
    `Sparse`.  Everything else of the model is trained as before.

    Parameters
    ----------
    model
        left as it is.
    state
        {name: code}, as from `codes.encode` with `kmeans`.  A code is a
        `Codebook`, also as the values of a `Sparse` or under a `View`.
        Tensors in it are left to the model.

    Returns
    -------
    A copy of the model
        Ready for `train.fit`.  Each code has centroids of its own, as
        parameters of the model; the weights they replace are frozen.

    Raises
    ------
    ValueError
        If a code has no centroids to train or does not fit its weight, or
        there is no code; names it.

    References
    ----------
    Han et al., Deep Compression, arXiv:1510.00149, section 3.3, equation 3.

    Examples
    --------
    >>> from .clusters import kmeans
    >>> model = nn.Linear(3, 2)
    >>> state = codes.encode(model, lambda w: kmeans(w, bits=1))
    >>> clustered = cluster(model, state)
    >>> len(clustered.weight.unique())
    2
    """
    made = {n: x for n, x in state.items() if isinstance(x, codes.Code)}
    if not made:
        raise ValueError("state holds no code")
    weights = dict(model.named_parameters(remove_duplicate=False))
    centroids, members = {}, {}
    for name, code in made.items():
        _check(name, code, weights)
        centroids[name] = nn.Parameter(codes.value(_book(name, code).centroids))
        members[name] = _members(name, code)
    model = through.attach(
        model, list(made), look_up, centroids=centroids, members=members
    )
    for name in made:
        path, _, key = name.rpartition(".")
        steps = model.get_submodule(path).parametrizations[key]
        steps.original.requires_grad_(False)
    return model


def look_up(w: Tensor, centroids: Tensor, members: Tensor) -> Tensor:
    """Return the weights of a clustered layer; its old weights play no part.

    Parameters
    ----------
    w
        the weights that are replaced.
    centroids
        (K,).
    members
        as w: 0 for a weight that is 0, k + 1 for one that is c_k.
    """
    return torch.cat([centroids.new_zeros(1), centroids])[members]


def encode_clustered(model: nn.Module, state: codes.State) -> codes.State:
    """Put the trained centroids back into the codes.

    Parameters
    ----------
    model
        what became of the result of `cluster`.
    state
        the one that was given to `cluster`.

    Returns
    -------
    {name: Tensor or Code}
        For `storage`.  It decodes to exactly the weights of the model, which
        `through.bake` makes an ordinary one.

    Raises
    ------
    ValueError
        If a code of `state` is not attached to the model.

    Examples
    --------
    >>> from .clusters import kmeans
    >>> model = nn.Linear(3, 2)
    >>> state = codes.encode(model, lambda w: kmeans(w, bits=1))
    >>> encode_clustered(cluster(model, state), state)["weight"]
    Codebook(Ints(uint8[2, 3], 1), float32[2])
    """
    found = through.tensors(model)
    full = codes.encode(through.bake(model), codes.value, lambda n, w: False)
    made = {}
    for name, code in state.items():
        if isinstance(code, codes.Code):
            if "members" not in found.get(name, {}):
                raise ValueError(f"{name}: the model has no centroids for it")
            c = found[name]["centroids"].detach().clone()
            made[id(full[name])] = _with_centroids(name, code, c)
    return {name: made.get(id(x), x) for name, x in full.items()}


def _with_centroids(name: str, code: codes.Code, c: Tensor) -> codes.Code:
    """Return the same code with other centroids."""
    if isinstance(code, codes.Codebook):
        return replace(code, centroids=c)
    if isinstance(code, codes.View):
        return replace(code, x=_with_centroids(name, code.x, c))
    if isinstance(code, codes.Sparse):
        return replace(code, values=_with_centroids(name, code.values, c))
    raise ValueError(f"{name}: no centroids to train in {code!r}")


def _book(name: str, code: codes.Code) -> codes.Codebook:
    while isinstance(code, (codes.View, codes.Sparse)):
        code = code.x if isinstance(code, codes.View) else code.values
    if not isinstance(code, codes.Codebook):
        raise ValueError(f"{name}: no centroids to train in {code!r}")
    return code


def _members(name: str, code: codes.Code) -> Tensor:
    """Return k + 1 where a weight is centroid k, and 0 where it is 0."""
    c = codes.value(_book(name, code).centroids)
    number = torch.arange(1, len(c) + 1, device=c.device)
    # the code itself says where its centroids go, if they are 1, 2, 3, ...
    return _with_centroids(name, code, number).decode()


def _check(name: str, code: codes.Code, weights: dict[str, Tensor]) -> None:
    if name not in weights:
        raise ValueError(f"{name}: the model has no such parameter")
    c, w = codes.value(_book(name, code).centroids), weights[name]
    if c.ndim != 1 or c.dtype != w.dtype or code.shape != tuple(w.shape):
        raise ValueError(
            f"{name}: centroids {tuple(c.shape)} of {c.dtype} that make "
            f"{code.shape} do not fit {tuple(w.shape)} of {w.dtype}"
        )
