"""What the experiments on the published encoder share: text without labels.

Paragraphs of whole topics of the language reference choose (validation) and
report (test); passages of the other topics calibrate.  `by_block` compresses
one block after the other.
"""

from copy import deepcopy
from types import SimpleNamespace

import pruned_encoder

from minicompress import calibrate, codes, data, export, storage, train, zoo

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


def by_block(model, batches, rule):
    """Compress block by block, each on inputs from the compressed before.

    What pruned_encoder.by_block does, in two passes in all: a block reads
    what the one before it has returned.

    batches  token numbers, without padding
    rule     (name, W, stats) -> code, or a tensor

    Returns {name: code}.
    """
    start, made = deepcopy(model), {}
    start.blocks = start.blocks[:0]
    with train.evaluating(start):
        x = [start(ids) for ids in batches]
    for i, block in enumerate(model.blocks):
        block, new = deepcopy(block), {}
        for name, stats in calibrate.inputs(block, x).items():
            W = block.get_parameter(name).detach()
            new[name] = rule(f"blocks.{i}.{name}", W, stats)
        block = changed(block, new)
        with train.evaluating(block):
            x = [block(h) for h in x]
        made |= {f"blocks.{i}.{name}": code for name, code in new.items()}
    return made


def changed(model, made):
    """Copy a model, with the weights that the codes stand for."""
    return export.decoded(model, model.state_dict() | made)


def bits(made, weights=None):
    """Count the bits of the codes for each weight that they stand for.

    weights  how many, if some are gone altogether
    """
    if weights is None:
        weights = sum(codes.value(c).numel() for c in made.values())
    return 8 * sum(map(storage.payload, made.values())) / weights
