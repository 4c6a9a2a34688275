"""The Transformers that two experiments of chapter 10 time and search."""

import torch

from minicompress import models, nas

MERGES, VOCAB, CONTEXT = 415, 512, 64
SPACE = nas.transformer_space()
IDS = torch.zeros(1, CONTEXT, dtype=torch.long)  # one passage


def network(arch):
    return nas.transformer(arch, vocab=VOCAB, context=CONTEXT)


def time_table(repeats):
    """Measure every part that a member of the space can have."""
    single = SPACE.where(lambda arch: arch["layers"] == 1)
    examples = ((network(arch), IDS) for arch in single)
    block = (models.language.Block,)
    return nas.latency_table(examples, parts=block, repeats=repeats)


def seconds(table, arch):
    """Look a network up; nothing is computed."""
    with torch.device("meta"):
        return table.seconds(network(arch), IDS.to("meta"))
