"""Products of packed signs against torch's float32 products.

Weights are packed once, activations at every call.  With one vector a product
waits for memory, and there are 32 times fewer bytes to wait for.  With many,
float32 is bound by its multiplications, which a good kernel does dozens of at
a time.  numpy's XOR, count and sum do 64 to a word, but each is a pass over
the cache: about as fast as float32, and what packing buys is storage only.
"""

import torch
import torch.nn.functional as F

from minicompress import quantize

from .harness import Row, times


def rows():
    yield matmul_row(1, 4096, 4096, 0.5)
    yield matmul_row(16, 4096, 4096, 1.0)
    yield matmul_row(1024, 1024, 1024, 1.3)
    yield conv_row(1.3)
    yield bytes_row()


def drawn(*size):
    x = torch.randn(*size, generator=torch.Generator().manual_seed(0))
    return torch.where(x >= 0, 1.0, -1.0)


def matmul_row(m: int, n: int, k: int, most: float) -> Row:
    A, B = drawn(m, k), drawn(n, k)
    b = quantize.pack_signs(B)

    def ours():
        return quantize.xnor_matmul(quantize.pack_signs(A), b, k=k)

    def peer():
        return A @ B.T

    assert torch.equal(ours().float(), peer())
    what = f"signs, ({m}, {k}) by ({n}, {k})"
    return time_row(what, ours, peer, most)


def conv_row(most: float) -> Row:
    x, W = drawn(4, 256, 28, 28), drawn(256, 256, 3, 3)

    def ours():
        return quantize.xnor_conv2d(x, W, padding=1)

    def peer():
        return F.conv2d(x, W, padding=1)

    assert torch.equal(ours().float(), peer())
    what = "signs, 3 x 3 convolution of (4, 256, 28, 28) to 256 channels"
    return time_row(what, ours, peer, most)


def bytes_row() -> Row:
    W = drawn(4096, 4096)
    packed = quantize.pack_signs(W)
    ratio = packed.nbytes / W.nbytes
    return Row(
        "bytes of 4096 x 4096 signs",
        f"{packed.nbytes / 1e6:.1f} MB",
        f"{W.nbytes / 1e6:.1f} MB",
        ratio,
        "1/32 of float32",
        ratio == 1 / 32,
    )


def time_row(what: str, ours, peer, most: float) -> Row:
    a, b = times(ours, peer)
    return Row(
        what,
        f"{1e3 * a:.2f} ms",
        f"{1e3 * b:.2f} ms",
        a / b,
        f"<= {most:g}x float32",
        a <= most * b,
    )
