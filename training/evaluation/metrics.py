"""Figures of merit of drawn pictures: pure functions of features, embeddings and ranks.

Features are (N, D) of any network, here a judge CLIP's image embeddings; sums are in float64. Distances
between distributions depend on N: compare only figures of the same N and the same network.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# ------------------------------------------------------------ two distributions


def check_features(a: Tensor, b: Tensor, least: int = 2) -> tuple[Tensor, Tensor]:
    """Both in float64. Raises ValueError unless they are (N, D) and (M, D), N and M at least `least`."""
    shapes = tuple(a.shape), tuple(b.shape)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < least:
        raise ValueError(f"features must be (N, D) and (M, D) with N, M >= {least}, got {shapes}")
    return a.double(), b.double()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of features (N, D) and (M, D). Heusel 2017, eq. 6.

    tr (C_a C_b)^(1/2) is the sum of the square roots of the eigenvalues of C_a^(1/2) C_b C_a^(1/2). Finite
    samples overestimate it, small ones more. Raises ValueError for other shapes.
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
    """KID: the unbiased estimate of MMD^2 with the kernel k(x, y) = (x.y / D + 1)^3. Binkowski 2018, eq. 4.

    mean_{i != j} k(a_i, a_j) + mean_{i != j} k(b_i, b_j) - 2 mean_{i, j} k(a_i, b_j); it can be
    negative where the distributions agree. The kernel expects |x|^2 of about D: scale unit vectors by sqrt(D)
    first, or it sees little but their mean. Raises ValueError for other shapes.
    """
    a, b = check_features(a, b)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def mean_of_pairs(x: Tensor) -> Tensor:
        values = kernel(x, x)
        return (values.sum() - values.trace()) / (len(x) * (len(x) - 1))

    return float(mean_of_pairs(a) + mean_of_pairs(b) - 2 * kernel(a, b).mean())


def pairwise_distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean, (N, M), from squared differences, so that equal rows have a distance of exactly 0."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def neighbour_radii(features: Tensor, k: int) -> Tensor:
    """(N,) distance of each point to its k-th nearest among the others."""
    return pairwise_distances(features, features).fill_diagonal_(torch.inf).kthvalue(k, dim=1).values


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Share of fake points on the real manifold and of real ones on the fake. Kynkaanniemi 2019, eq. 1-3.

    A manifold is the union of the balls around its points that reach to the k-th nearest neighbour of each.
    Raises ValueError unless both have more than k points of the same dimension.
    """
    real, fake = check_features(real, fake, k + 1)
    distances = pairwise_distances(real, fake)  # (N, M)
    precision = (distances <= neighbour_radii(real, k)[:, None]).any(0).double().mean()
    recall = (distances <= neighbour_radii(fake, k)).any(1).double().mean()
    return float(precision), float(recall)


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> tuple[float, float]:
    """Naeem 2020, eq. 4 and 5, on the real points' balls to their k-th nearest neighbours.

    density = 1/(k M) sum over fake points of the real balls that it lies in: a lone outlier among the real
    points counts once, where for precision it opens a large ball; above 1 where fakes crowd real modes.
    coverage = share of the real balls with a fake point in them. Two equal distributions have density 1 and
    coverage 1 - 2^-k or so. Raises ValueError as precision_recall does.
    """
    real, fake = check_features(real, fake, k + 1)
    inside = pairwise_distances(real, fake) <= neighbour_radii(real, k)[:, None]  # (N, M)
    return float(inside.double().sum() / (k * len(fake))), float(inside.any(1).double().mean())


# ------------------------------------------------------------ pictures against captions


def recall_at(ranks: Tensor, k: int) -> float:
    """Share of ranks, (N,) with 0 the first, among the first k."""
    return float((ranks < k).double().mean())


def clip_score(image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    """100 max(cos(image, caption), 0) of each pair, (N,) from (N, D) twice. Hessel 2021, eq. 1, whose weight
    of 2.5 is 100 here, as torchmetrics has it."""
    return 100 * F.cosine_similarity(image_embeds, text_embeds, dim=-1).clamp(min=0)


# ------------------------------------------------------------ nearest neighbours


def nearest_neighbours(
    queries: Tensor, references: Tensor, own: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine distance 1 - cos to the nearest reference, (N,), and its number, (N,).

    Args:
        queries, references: (N, D) and (M, D).
        own: (N,) the number of each query's own row among the references, which is skipped.
    """
    queries, references = F.normalize(queries, dim=-1), F.normalize(references, dim=-1)
    nearest = []
    for start in range(0, len(queries), 1024):  # all at once takes N M numbers
        similarity = queries[start : start + 1024] @ references.T
        if own is not None:
            similarity.scatter_(1, own[start : start + 1024, None], -torch.inf)
        nearest.append(similarity.max(1))
    values, indices = (torch.cat(part) for part in zip(*nearest, strict=True))
    return 1 - values, indices


# ------------------------------------------------------------ how sure they are


def bootstrap_interval(
    statistic: Callable[..., float],
    *samples: Tensor,
    replicates: int = 200,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Bootstrap interval (Efron 1979): each sample's rows are drawn again with replacement.

    statistic(*samples) + (quantiles of the replicates - their mean), the percentile interval without the
    replicates' bias: repeated rows make every replicate of a Frechet or kernel distance larger by about the
    same amount. The interval of a kernel distance is too wide where the distributions agree.

    Args:
        statistic: a function of as many tensors as there are samples, e.g. frechet_distance.
        samples: (N, ...) each, independent of the others; rows that belong together go into one tensor.
    """
    generator = torch.Generator().manual_seed(seed)

    def again(x: Tensor) -> Tensor:
        return x[torch.randint(len(x), (len(x),), generator=generator, device="cpu")]

    drawn = [statistic(*map(again, samples)) for _ in range(replicates)]
    values = torch.tensor(drawn, dtype=torch.float64)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = (statistic(*samples) + values.quantile(tails) - values.mean()).tolist()
    return low, high
