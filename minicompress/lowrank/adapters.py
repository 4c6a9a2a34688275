"""Adapters: a low-rank change beside a weight that stays as it is.

W' = W + u v, with u (out, r) and v (r, in), trains r (out + in) numbers in
place of out · in.  That alone compresses nothing: W is still there.  But W
may be stored in few bits, and an adapter is small: one base serves many
tasks.  An *adapter* is {name of a weight: codes.Factors}.
"""

import os
from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn

from .. import codes, storage, through


def lora(
    model: nn.Module,
    names: through.Names,
    *,
    rank: int,
    alpha: float | None = None,
    seed: int = 0,
) -> nn.Module:
    """Let a model learn low-rank changes of its weights and nothing else.

    The weight in use is W' = W + (α/r) B A, with A (r, in) drawn at random
    and B (out, r) zero: at first nothing changes.

    Parameters
    ----------
    model
        left as it is.
    names
        of the weights that get a change, as in `through.attach`.  A kernel
        (out, in, kh, kw) is taken as a matrix (out, in·kh·kw).
    rank
        r.
    alpha
        α, how fast the change grows compared with A and B; by default r,
        so that the factor is 1.
    seed
        of A, whose entries have the variance 1/in.

    Returns
    -------
    A copy of the model
        For training.  Only A and B require gradients: set ``requires_grad`` of
        biases or norms, if they are to learn as well.  (The averages that
        batch norms keep move in training as always.) ``through.bake`` gives
        the merged model, `adapter` the changes alone.

    Raises
    ------
    ValueError
        If a name is unknown or no matrix, or rank is below 1.

    References
    ----------
    Hu et al., LoRA: Low-Rank Adaptation of Large Language Models,
    arXiv:2106.09685, section 4.1, equation 3.

    Examples
    --------
    >>> model = lora(nn.Linear(64, 32), "weight", rank=2)
    >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
    192
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    weights = dict(model.named_parameters(remove_duplicate=False))
    if callable(names):
        names = [n for n, w in weights.items() if names(n, w)]
    names = [names] if isinstance(names, str) else list(names)
    dice = torch.Generator().manual_seed(seed)
    start = {}
    for name in names:
        if name not in weights or weights[name].ndim < 2:
            raise ValueError(f"names: {name!r} is no matrix of the model")
        w = weights[name].flatten(1)
        v = torch.randn(rank, w.shape[1], generator=dice) / w.shape[1] ** 0.5
        u = torch.zeros(len(w), rank)
        start[name] = codes.Factors(u, v)
    scale = 1.0 if alpha is None else alpha / rank
    return with_adapter(model, start, scale=scale)


def with_adapter(
    model: nn.Module,
    adapter: Mapping[str, codes.Factors],
    *,
    scale: float = 1.0,
) -> nn.Module:
    """Put an adapter on a model, to use it or to train it further.

    Parameters
    ----------
    model
        left as it is.
    adapter
        {name of a weight: Factors u (out, r) and v (r, in)}, as from
        `adapter` or the ``b`` of `corrected`.
    scale
        s: the weight in use is W + (s u) v.

    Returns
    -------
    A copy of the model, as from `lora`.

    Raises
    ------
    ValueError
        If a name is unknown, or factors do not fit its weight.

    Examples
    --------
    >>> change = codes.Factors(torch.ones(2, 1), torch.tensor([[1.0, 0, 0]]))
    >>> model = nn.Linear(3, 2)
    >>> new = with_adapter(model, {"weight": change})
    >>> (new.weight - model.weight).detach().round()
    tensor([[1., 0., 0.],
            [1., 0., 0.]])
    """
    weights = dict(model.named_parameters(remove_duplicate=False))
    u, v, by = {}, {}, {}
    for name, factors in adapter.items():
        like = weights.get(name, factors.u)
        if name in weights and factors.shape != like.flatten(1).shape:
            raise ValueError(
                f"{name}: factors of {factors.shape} do not fit a weight "
                f"{tuple(like.shape)}"
            )
        kind = torch.promote_types(like.dtype, torch.float32)
        to = {"device": like.device, "dtype": kind}
        u[name] = nn.Parameter(codes.value(factors.u).to(**to))
        v[name] = nn.Parameter(codes.value(factors.v).to(**to))
        by[name] = torch.tensor(scale, **to)
    frozen = deepcopy(model).requires_grad_(False)
    return through.attach(frozen, adapter, _changed, B=u, A=v, scale=by)


def adapter(model: nn.Module) -> dict[str, codes.Factors]:
    """Take the changes off a model, as they are now.

    Parameters
    ----------
    model
        from `lora` or `with_adapter`, perhaps trained since; left as it is.

    Returns
    -------
    {name of a weight: Factors}, to be put on a model with `with_adapter`.

    Raises
    ------
    ValueError
        If the model has no adapter.

    Examples
    --------
    >>> model = lora(nn.Linear(64, 32), "weight", rank=2)
    >>> adapter(model)
    {'weight': Factors(float32[32, 2], float32[2, 64], None)}
    """
    found, made = {}, {}
    for name, own in through.tensors(model).items():
        if {"A", "B", "scale"} <= own.keys():
            B, A = own["B"], own["A"]
            if id(A) not in made:  # tied weights have one change
                made[id(A)] = codes.Factors(
                    own["scale"] * B.detach(), A.detach().clone()
                )
            found[name] = made[id(A)]
    if not found:
        raise ValueError("model: it has no adapter")
    return found


def encode_adapted(model: nn.Module, base: codes.State) -> codes.State:
    """Encode an adapted model as its base, in few bits, and the changes.

    Parameters
    ----------
    model
        from `lora` or `with_adapter` on the decoded base.
    base
        {name: Tensor or Code} of the base, as from `codes.encode`.

    Returns
    -------
    {name: Tensor or Code}
        A weight with a change is a `Sum` of its code and `Factors`.  What
        else was trained is stored as it is now.  Decodes to the weights of
        ``through.bake(model)``, bit for bit; in half precision up to the
        rounding of the base, which a code decodes more exactly.

    Raises
    ------
    ValueError
        If a weight that was changed is not that of the base.

    References
    ----------
    Dettmers et al., QLoRA, arXiv:2305.14314, section 3.

    Examples
    --------
    >>> base = {"weight": codes.Affine(torch.tensor([[1, 2]]), 0.5)}
    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = model.load_state_dict(codes.decode(base))
    >>> encode_adapted(lora(model, "weight", rank=1), base)
    ... # doctest: +NORMALIZE_WHITESPACE
    {'weight': Sum(Affine(int64[1, 2], 0.5, 0),
                   Factors(float32[1, 1], float32[1, 2], None))}
    """
    now = through.bake(model).state_dict()
    if now.keys() != base.keys():
        odd = sorted(now.keys() ^ base.keys())
        raise ValueError(f"base: {odd[:3]} are not in both base and model")
    changes, made = adapter(model), {}
    for name, x in base.items():
        if id(x) in made:  # tied weights are encoded once
            continue
        code = x
        if name in changes:
            shape = codes.shape(x)
            change = changes[name]
            if len(shape) > 2:  # a kernel
                change = codes.View(change, shape)
            code = codes.Sum(x, change)
            if not _same(codes.value(code), now[name]):
                raise ValueError(f"{name}: base is not what the model changes")
        elif not torch.equal(codes.value(x).to(now[name].dtype), now[name]):
            code = now[name]
        made[id(x)] = code
    return {name: made[id(x)] for name, x in base.items()}


def save_adapter(
    path: str | os.PathLike, adapter: Mapping[str, codes.Factors]
) -> int:
    """Write an adapter to a file of its own; return its length in bytes.

    Parameters
    ----------
    path
        ``storage.read(path).state`` is the adapter again.
    adapter
        {name of a weight: Factors}; u and v may be codes, in 8 bits say.

    Examples
    --------
    >>> import tempfile
    >>> change = adapter(lora(nn.Linear(64, 32), "weight", rank=2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     size = save_adapter(f"{folder}/task.mc", change)
    ...     again = storage.read(f"{folder}/task.mc").state
    >>> again
    {'weight': Factors(float32[32, 2], float32[2, 64], None)}
    >>> size - 192 * 4  # header and checksum
    91
    """
    shell = nn.Module()  # what a file needs to know: names and shapes
    for name, factors in adapter.items():
        *parts, key = name.split(".")
        owner = shell
        for part in parts:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner._modules[part]
        empty = torch.empty(codes.shape(factors), device="meta")
        owner.register_parameter(key, nn.Parameter(empty))
    return storage.save(path, shell, dict(adapter))


def _changed(w: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    """Compute the weight in use, as the codes of `adapter` decode."""
    change = (scale * B) @ A
    return (w.to(change.dtype) + change.reshape(w.shape)).to(w.dtype)


def _same(x: Tensor, w: Tensor) -> bool:
    """Tell whether w is x, as far as its type can tell."""
    eps = torch.finfo(w.dtype).eps if w.dtype.itemsize < 4 else 0
    return bool((x - w).abs().max() <= 2 * eps * w.abs().max())
