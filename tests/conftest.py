"""One thread for the tiny models, and what nbval need not compare."""

import torch

torch.set_num_threads(1)

collect_ignore = ["benchmarks"]  # not tests: `make bench`

CLAIM = "application/vnd.minicompress.claim+json"
# a claim's sentence is compared, the value measured for it is not; vector
# graphics carry dates, stderr carries progress bars
NOT_COMPARED = (CLAIM, "image/svg+xml", "stderr")


def pytest_collection_modifyitems(items):
    notebooks = {id(i.parent): i.parent for i in items}.values()
    for file in notebooks:
        if hasattr(file, "skip_compare"):
            file.skip_compare = (*file.skip_compare, *NOT_COMPARED)
