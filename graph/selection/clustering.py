"""Distance to the own cluster's centre, by mini-batch k-means (Sculley 2010) with k-means++ (Arthur and Vassilvitskii
2007).

Mini-batches find the centres roughly; a few full steps of Lloyd's algorithm settle them, and never raise the objective,
the sum of squared distances. A centre that loses all its nodes stays where it is.

Shapes: N nodes, K clusters, D dimensions, B a batch.
"""

import numpy as np
import numpy.typing as npt

from graph.store import Float32s, Int64s

Floats = npt.NDArray[np.float64]

BATCH = 1024
NUM_BATCHES = 100
MAX_FULL_STEPS = 20
_START_SAMPLE = 8192
_ROWS = 8192  # of the memory-mapped vectors at a time


def cluster_distances(vectors_ND: Float32s, num_clusters: int, seed: int) -> Floats:
    """Euclidean distance of every node to the centre of its cluster."""
    rng = np.random.default_rng(seed)
    centres_KD = start_centres(vectors_ND, num_clusters, rng)
    centres_KD = mini_batch_centres(vectors_ND, centres_KD, rng)
    own_N, squares_N = assign(vectors_ND, centres_KD)
    for _ in range(MAX_FULL_STEPS):
        centres_KD = mean_centres(vectors_ND, own_N, centres_KD)
        before_N = own_N
        own_N, squares_N = assign(vectors_ND, centres_KD)
        if np.array_equal(own_N, before_N):
            break
    return np.sqrt(squares_N)


def start_centres(vectors_ND: Float32s, num_clusters: int, rng: np.random.Generator) -> Floats:
    """k-means++ over a sample: each further centre drawn by its squared distance to those before."""
    num_nodes = len(vectors_ND)
    size = min(num_nodes, max(_START_SAMPLE, num_clusters))
    sample_SD = vectors_ND[np.sort(rng.choice(num_nodes, size, replace=False))].astype(np.float64)
    chosen = [int(rng.integers(size))]
    squares_S = ((sample_SD - sample_SD[chosen[0]]) ** 2).sum(axis=1)
    while len(chosen) < num_clusters:
        total = squares_S.sum()
        weights = squares_S / total if total > 0 else None  # None: all points are alike
        chosen.append(int(rng.choice(size, p=weights)))
        np.minimum(squares_S, ((sample_SD - sample_SD[chosen[-1]]) ** 2).sum(axis=1), out=squares_S)
    return sample_SD[chosen]


def mini_batch_centres(
    vectors_ND: Float32s, centres_KD: Floats, rng: np.random.Generator
) -> Floats:
    """Each centre ends as the mean of all points that it was nearest to when they were drawn."""
    centres_KD = centres_KD.copy()
    num_nodes, num_clusters = len(vectors_ND), len(centres_KD)
    counts_K = np.zeros(num_clusters, dtype=np.int64)
    for _ in range(NUM_BATCHES):
        rows = np.sort(rng.integers(num_nodes, size=min(BATCH, num_nodes)))
        batch_BD = vectors_ND[rows].astype(np.float64)
        own_B, _ = assign(batch_BD, centres_KD)
        sums_KD, seen_K = _sums(batch_BD, own_B, num_clusters)
        counts_K += seen_K
        moved = seen_K > 0
        drift = sums_KD[moved] - seen_K[moved, None] * centres_KD[moved]
        centres_KD[moved] += drift / counts_K[moved, None]
    return centres_KD


def mean_centres(vectors_ND: Float32s, own_N: Int64s, centres_KD: Floats) -> Floats:
    """The mean of every cluster; an empty one keeps its centre."""
    sums_KD = np.zeros_like(centres_KD)
    counts_K = np.zeros(len(centres_KD), dtype=np.int64)
    for first in range(0, len(vectors_ND), _ROWS):
        some_BD = vectors_ND[first : first + _ROWS].astype(np.float64)
        sums, counts = _sums(some_BD, own_N[first : first + _ROWS], len(centres_KD))
        sums_KD += sums
        counts_K += counts
    filled = counts_K > 0
    result_KD = centres_KD.copy()
    result_KD[filled] = sums_KD[filled] / counts_K[filled, None]
    return result_KD


def assign(vectors_ND: Float32s | Floats, centres_KD: Floats) -> tuple[Int64s, Floats]:
    """Index of the nearest centre, the first of equals, and the squared distance to it."""
    own_N = np.empty(len(vectors_ND), dtype=np.int64)
    squares_N = np.empty(len(vectors_ND))
    half_K = (centres_KD**2).sum(axis=1) / 2
    for first in range(0, len(vectors_ND), _ROWS):
        some_BD = vectors_ND[first : first + _ROWS].astype(np.float64)
        own_B = (half_K - some_BD @ centres_KD.T).argmin(axis=1)
        own_N[first : first + _ROWS] = own_B
        # Not by the binomial formula, which loses the digits of a small distance.
        squares_N[first : first + _ROWS] = ((some_BD - centres_KD[own_B]) ** 2).sum(axis=1)
    return own_N, squares_N


def _sums(points_BD: Floats, own_B: Int64s, num_clusters: int) -> tuple[Floats, Int64s]:
    """Sum and number of the points of every cluster."""
    from scipy.sparse import csr_array

    members = csr_array(
        (np.ones(len(own_B)), (own_B, np.arange(len(own_B)))), shape=(num_clusters, len(own_B))
    )
    return np.asarray(members @ points_BD), np.bincount(own_B, minlength=num_clusters)
