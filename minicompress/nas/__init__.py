"""Architecture search: look for a network instead of shrinking one."""

from .bilevel import alpha_gradient, darts
from .chains import digits_network, digits_space
from .driver import search
from .elastic import elastic_kernels, sorted_channels
from .history import History, Record
from .latency import LatencyTable, expected_latency, latency_table, soft_limit
from .mixtures import Mixed, digits_mixture, discretize, strengths, strongest
from .pareto import crowding, dominates, front, fronts, hypervolume
from .policies import reinforce
from .populations import evolve, nsga2
from .proxies import grad_norm, naswot, snip, synflow
from .ranking import kendall, spearman
from .slices import inherit, subnet
from .spaces import Space
from .strategies import exhaustive, halving, random_search
from .supernet import fit_supernet, recalibrate
from .transformers import transformer, transformer_space

__all__ = [
    "History",
    "LatencyTable",
    "Mixed",
    "Record",
    "Space",
    "alpha_gradient",
    "crowding",
    "darts",
    "digits_mixture",
    "digits_network",
    "digits_space",
    "discretize",
    "dominates",
    "elastic_kernels",
    "evolve",
    "exhaustive",
    "expected_latency",
    "fit_supernet",
    "front",
    "fronts",
    "grad_norm",
    "halving",
    "hypervolume",
    "inherit",
    "kendall",
    "latency_table",
    "naswot",
    "nsga2",
    "random_search",
    "recalibrate",
    "reinforce",
    "search",
    "snip",
    "soft_limit",
    "sorted_channels",
    "spearman",
    "strengths",
    "strongest",
    "subnet",
    "synflow",
    "transformer",
    "transformer_space",
]
