"""Quality metrics for generated pictures: pure functions of features, embeddings and ranks.

Features are (N, D) from any network, here a judge CLIP's image embeddings; sums are in float64. Distances
between distributions depend on N: compare only figures with the same N and the same network.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# ------------------------------------------------------------ two distributions


def check_features(a: Tensor, b: Tensor, least: int = 2) -> tuple[Tensor, Tensor]:
    """Both features in float64. Raises ValueError unless they are (N, D) and (M, D) with N, M >= `least`."""
    shapes = tuple(a.shape), tuple(b.shape)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < least:
        raise ValueError(f"features must be (N, D) and (M, D) with N, M >= {least}, got {shapes}")
    return a.double(), b.double()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2)) for features (N, D) and (M, D) (Heusel 2017, eq. 6).

    Tr (C_a C_b)^(1/2) is the sum of the square roots of the eigenvalues of C_a^(1/2) C_b C_a^(1/2). Finite
    samples overestimate the distance, small ones more so. Raises ValueError for other shapes.
    """
    a, b = check_features(a, b)
    covariance_a, covariance_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(covariance_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp(min=0).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    distance = means + covariance_a.trace() + covariance_b.trace() - 2 * cross
    return float(distance.clamp(min=0))


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """KID: the unbiased estimate of MMD^2 with the kernel k(x, y) = (x.y / D + 1)^3 (Binkowski 2018, eq. 4).

    The estimate is mean_{i != j} k(a_i, a_j) + mean_{i != j} k(b_i, b_j) - 2 mean_{i, j} k(a_i, b_j). It can
    be negative if the distributions agree. The kernel expects |x|^2 to be about D: scale unit vectors by
    sqrt(D) first, or the result reflects little but their mean. Raises ValueError for other shapes.
    """
    a, b = check_features(a, b)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def mean_of_pairs(x: Tensor) -> Tensor:
        values = kernel(x, x)
        return (values.sum() - values.trace()) / (len(x) * (len(x) - 1))

    return float(mean_of_pairs(a) + mean_of_pairs(b) - 2 * kernel(a, b).mean())


def pairwise_distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances (N, M), from squared differences, so that equal rows are exactly 0 apart."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def neighbour_radii(features: Tensor, k: int) -> Tensor:
    """(N,) distance from each point to its k-th nearest neighbour."""
    return pairwise_distances(features, features).fill_diagonal_(torch.inf).kthvalue(k, dim=1).values


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """(precision, recall): the share of fake points on the real manifold, and of real points on the fake
    manifold (Kynkaanniemi 2019, eq. 1-3).

    A manifold is the union of balls around its points, each reaching to the point's k-th nearest neighbour.
    Raises ValueError unless both have more than k points, of the same dimension.
    """
    real, fake = check_features(real, fake, k + 1)
    distances = pairwise_distances(real, fake)  # (N, M)
    precision = (distances <= neighbour_radii(real, k)[:, None]).any(0).double().mean()
    recall = (distances <= neighbour_radii(fake, k)).any(1).double().mean()
    return float(precision), float(recall)


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> tuple[float, float]:
    """(density, coverage) of fake points Y_j with respect to real points X_i (Naeem 2020, eq. 4 and 5).

        density = 1/(k M) sum_j sum_i 1[Y_j in B(X_i, NND_k(X_i))]
        coverage = 1/N sum_i 1[some Y_j in B(X_i, NND_k(X_i))]

    B(X_i, NND_k(X_i)) is the ball around X_i that reaches to its k-th nearest real neighbour. In the density,
    a lone outlier among the real points is only one ball of many, whereas for precision its large ball alone
    decides. The density exceeds 1 if fake points crowd real modes. Two equal distributions have a density of
    1 and a coverage of about 1 - 2^-k. Raises ValueError like precision_recall.
    """
    real, fake = check_features(real, fake, k + 1)
    inside = pairwise_distances(real, fake) <= neighbour_radii(real, k)[:, None]  # (N, M)
    return float(inside.double().sum() / (k * len(fake))), float(inside.any(1).double().mean())


# ------------------------------------------------------------ pictures against captions


def recall_at(ranks: Tensor, k: int) -> float:
    """The share of ranks (N,), counted from 0, that are below k."""
    return float((ranks < k).double().mean())


def clip_score(image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    """w max(cos(c, v), 0) for each pair of a caption c and an image v, (N,) from (N, D) and (N, D) (Hessel
    2021, eq. 1). w is 100, as in torchmetrics, rather than the paper's 2.5."""
    return 100 * F.cosine_similarity(image_embeds, text_embeds, dim=-1).clamp(min=0)


# ------------------------------------------------------------ nearest neighbours


def nearest_neighbours(
    queries: Tensor, references: Tensor, own: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(distances, numbers), both (N,): each query's cosine distance, 1 - cos, to the nearest reference, and
    that reference's number.

    Args:
        queries, references: (N, D) and (M, D).
        own: (N,), the number of each query's own row among the references, which is skipped.
    """
    queries, references = F.normalize(queries, dim=-1), F.normalize(references, dim=-1)
    nearest = []
    for start in range(0, len(queries), 1024):  # all at once would need N M numbers
        similarity = queries[start : start + 1024] @ references.T
        if own is not None:
            similarity.scatter_(1, own[start : start + 1024, None], -torch.inf)
        nearest.append(similarity.max(1))
    values, indices = (torch.cat(part) for part in zip(*nearest, strict=True))
    return 1 - values, indices


# ------------------------------------------------------------ uncertainty


def bootstrap_interval(
    statistic: Callable[..., float],
    *samples: Tensor,
    replicates: int = 200,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Bootstrap interval (Efron 1979): each sample's rows are redrawn with replacement.

    The interval is statistic(*samples) + (quantiles of the replicates - their mean), which is the percentile
    interval without the replicates' bias: repeated rows make every replicate of a Frechet or kernel distance
    larger by about the same amount. The interval of a kernel distance is too wide if the distributions agree.

    Args:
        statistic: a function of as many tensors as there are samples, e.g. frechet_distance.
        samples: each (N, ...) and independent of the others; rows that belong together go into one tensor.
    """
    generator = torch.Generator().manual_seed(seed)

    def again(x: Tensor) -> Tensor:
        return x[torch.randint(len(x), (len(x),), generator=generator, device="cpu")]

    drawn = [statistic(*map(again, samples)) for _ in range(replicates)]
    values = torch.tensor(drawn, dtype=torch.float64)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = (statistic(*samples) + values.quantile(tails) - values.mean()).tolist()
    return low, high
