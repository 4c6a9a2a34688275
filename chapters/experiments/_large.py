"""What the experiments on the published encoder share: text without labels.

Paragraphs of whole topics of the language reference choose (validation) and
report (test); passages of the other topics calibrate.
"""

from copy import deepcopy
from types import SimpleNamespace

import pruned_encoder
from torch import nn

from minicompress import codes, data, quantize, storage, zoo

LENGTH, SHORTEST = pruned_encoder.LENGTH, 40  # tokens, characters


def paragraphs(split):
    """List the paragraphs of a part of the language reference."""
    text = getattr(data.reference(), split)
    found = (" ".join(p.split()) for p in text.split("\n\n"))
    return [p for p in found if len(p) >= SHORTEST]


class Texts:
    """Texts, and how near an encoder's embeddings are to the original's."""

    def __init__(self, model, tokenizer, texts):
        self.texts = list(texts)
        rows = {t: tokenizer.encode(t, LENGTH) for t in self.texts}
        # what each text is cut into is known already
        self.known = SimpleNamespace(
            encode=lambda text, length: rows[text], pad=tokenizer.pad
        )
        self.own = self.embed(model)

    def embed(self, model):
        return zoo.embed(model, self.known, self.texts, length=LENGTH)

    def compare(self, model):
        """Give the mean cosine, and the share of the same neighbors."""
        E = self.embed(model)
        near = pruned_encoder.nearest
        same = (near(E) == near(self.own)).double().mean()
        cosine = (E * self.own).sum(1).double().mean()
        return {"cosine": float(cosine), "neighbor": float(same)}


def in_int8(model):
    """Let the linear layers of the blocks multiply in int8."""
    model = deepcopy(model)
    for name, m in list(model.blocks.named_modules()):
        if isinstance(m, nn.Linear):
            model.blocks.set_submodule(name, quantize.Int8Linear(m))
    return model


def bits(made, weights=None):
    """Count the bits of the codes for each weight that they stand for.

    weights  how many, if some are gone altogether
    """
    if weights is None:
        weights = sum(codes.value(c).numel() for c in made.values())
    return 8 * sum(map(storage.payload, made.values())) / weights
