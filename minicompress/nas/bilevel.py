"""Search by gradient: the weights of a mixture are trained like weights.

The mixture weights α are trained on one half of the data and the network's
weights w on the other, in turn::

    min_α L_val(w*(α), α)    with    w*(α) = argmin_w L_train(w, α)

In the end the strongest operation of each mixture stays.  Nothing in the
search asks for the quality of that network.
"""

from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm.auto import tqdm

from ..train import cosine, cross_entropy
from ..train.loop import count, move, seeded
from .mixtures import mixtures

Loss = Callable[[Callable, object], Tensor]


def darts(
    model: nn.Module,
    batches: Iterable,
    held_out: Iterable,
    loss: Loss = cross_entropy,
    *,
    lr: float = 0.025,
    alpha_lr: float = 3e-4,
    order: int = 1,
    momentum: float = 0.9,
    decay: float = 3e-4,
    alpha_decay: float = 1e-3,
    schedule: Callable[[float], float] = cosine,
    steps: int | None = None,
    clip: float | None = 5.0,
    seed: int = 0,
    progress: bool = False,
    on_step: Callable[[int, nn.Module, float], None] | None = None,
) -> nn.Module:
    """Train mixtures and weights in turn: DARTS.

    A step is one of α by Adam, on a batch of `held_out`, and one of w by
    gradient descent with momentum, on a batch of `batches`.  The data must
    differ: α would otherwise be chosen by what w has learned by heart.

    Parameters
    ----------
    model
        with `Mixed` operations anywhere in it; left as it is.
    batches, held_out
        what `loss` takes, for w and for α; the paper halves the training
        data.
    loss
        ``loss(model, batch)`` returns a scalar; it may call the model but
        nothing else of it.
    lr, alpha_lr
        learning rates of w, the largest, and of α.
    order
        1 takes w for w*(α); 2 takes w after one more step of size ξ, the
        present learning rate: see `alpha_gradient`.  A step of 2 costs about
        five passes forward and back, a step of 1 two.
    momentum, decay, alpha_decay
        of w, and the L2 penalties of w and α.
    schedule
        from the fraction of the steps that is over to a factor on `lr`.
    steps
        ``len(batches)`` if left out.
    clip
        largest norm of the gradient of w.
    seed
        decides what is drawn with torch, dropout for instance.
    progress, on_step
        as in `train.fit`; ``on_step(step, model, loss)`` sees the model with
        its α (see `strengths`), and the training loss.

    Returns
    -------
    nn.Module
        The trained mixture, for `strongest` and `discretize`.

    Raises
    ------
    ValueError
        If there are no mixtures or no weights, too few batches, or `order`
        is not 1 or 2.

    References
    ----------
    Liu et al., DARTS, arXiv:1806.09055, algorithm 1 and section A.1.1.

    Examples
    --------
    >>> from minicompress.nas import Mixed, strongest
    >>> ops = {"skip": nn.Identity(), "relu": nn.ReLU()}
    >>> model = nn.Sequential(nn.Linear(1, 8), Mixed(ops), nn.Linear(8, 1))
    >>> def loss(model, x):  # a linear network cannot learn |x|
    ...     return (model(x) - x.abs()).square().mean()
    >>> x = torch.linspace(-1, 1, 64)[:, None]
    >>> feeds = [x[::2]] * 100, [x[1::2]] * 100
    >>> strongest(darts(model, *feeds, loss, lr=0.1, alpha_lr=0.03))
    {'1': 'relu'}
    """
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order}")
    steps = count(batches, steps)
    model = deepcopy(model).train()
    w, alpha = (list(part.values()) for part in _split(model))
    descent = torch.optim.SGD(w, lr, momentum, weight_decay=decay)
    adam = torch.optim.Adam(
        alpha, alpha_lr, betas=(0.5, 0.999), weight_decay=alpha_decay
    )
    pairs = islice(zip(batches, held_out, strict=False), steps)
    done = 0
    with seeded(seed, w[0].device):
        for pair in tqdm(pairs, total=steps, disable=not progress):
            batch, other = move(pair, w[0].device)
            rate = lr * schedule((done + 0.5) / steps)
            xi = rate if order == 2 else 0.0
            g = alpha_gradient(model, batch, other, loss, xi=xi)
            for a, grad in zip(alpha, g.values(), strict=True):
                a.grad = grad
            adam.step()
            value = loss(model, batch)
            grads = torch.autograd.grad(value, w, materialize_grads=True)
            for p, grad in zip(w, grads, strict=True):
                p.grad = grad
            if clip is not None:
                nn.utils.clip_grad_norm_(w, clip)
            descent.param_groups[0]["lr"] = rate
            descent.step()
            done += 1
            if on_step is not None:
                on_step(done, model, value.item())
    if done < steps:
        raise ValueError(f"batches: they ended after {done} of {steps} steps")
    model.zero_grad()
    return model.eval()


def alpha_gradient(
    model: nn.Module,
    batch: object,
    held_out: object,
    loss: Loss = cross_entropy,
    *,
    xi: float = 0.0,
) -> dict[str, Tensor]:
    """Compute the gradient by which DARTS moves α.

    One step of w stands for all that would lead to w*(α)::

        w' = w - ξ ∇_w L_train(w, α)
        ∇_α L_val(w', α) - ξ ∇²_{α,w} L_train(w, α) ∇_{w'} L_val(w', α)

    The product with the second derivatives is a difference of gradients at
    w± = w ± ε ∇_{w'} L_val with ε = 0.01 / ‖∇_{w'} L_val‖.

    Parameters
    ----------
    model, batch, held_out, loss
        as in `darts`; of the model nothing changes, running statistics
        neither.
    xi
        ξ, the step of w; 0 is the first order.

    Returns
    -------
    {name: Tensor}
        For the α of each mixture, by its name among the parameters.

    References
    ----------
    Liu et al., DARTS, arXiv:1806.09055, equations 5 to 8.

    Examples
    --------
    >>> from minicompress.nas import Mixed
    >>> mixed = Mixed({"skip": nn.Identity(), "relu": nn.ReLU()})
    >>> model = nn.Sequential(nn.Linear(1, 1), mixed)
    >>> for p in model[0].parameters():
    ...     p.data = -torch.ones_like(p)
    >>> x = torch.tensor([[3.0]])
    >>> alpha_gradient(model, x, x, lambda m, x: m(x).sum())  # -4 and 0
    {'1.alpha': tensor([-1.,  1.])}
    """
    w, alpha = _split(model)

    def grad(of, batch, w):
        all_of = (w | alpha).items()
        at = {n: t.detach().requires_grad_(n in of) for n, t in all_of}
        value = loss(partial(_call, model, at), batch)
        found = torch.autograd.grad(
            value, [at[n] for n in of], materialize_grads=True
        )
        return dict(zip(of, found, strict=True))

    def moved(by, direction):
        return {n: t.detach() + by * direction[n] for n, t in w.items()}

    if not xi:
        return grad(alpha, held_out, w)
    new = moved(-xi, grad(w, batch, w))
    direct = grad(w | alpha, held_out, new)
    v = {n: direct[n] for n in w}
    size = torch.stack([t.double().norm() for t in v.values()]).norm().item()
    eps = 0.01 / size if size else 1.0
    plus, minus = (grad(alpha, batch, moved(e, v)) for e in (eps, -eps))
    return {n: direct[n] - xi * (plus[n] - minus[n]) / (2 * eps) for n in alpha}


def _split(
    model: nn.Module,
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Return what is trained of a model: its weights, and its α."""
    alphas = {id(m.alpha) for m in mixtures(model).values()}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    w = {n: p for n, p in trained.items() if id(p) not in alphas}
    alpha = {n: p for n, p in trained.items() if id(p) in alphas}
    for name, part in (("weights", w), ("alpha", alpha)):
        if not part:
            raise ValueError(f"model: it has no {name} to train")
    return w, alpha


def _call(model: nn.Module, tensors: dict[str, Tensor], *args, **kwargs):
    """Call a model with other parameters; its buffers do not change."""
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    return functional_call(model, buffers | tensors, args, kwargs)
