"""Figures of merit against closed forms, cases counted by hand, their definitions in numpy and scipy, other
people's implementations where these are installed, and the statistics that they promise."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from training.evaluation.metrics import (
    bootstrap_interval,
    clip_score,
    density_coverage,
    frechet_distance,
    kernel_distance,
    nearest_neighbours,
    precision_recall,
    recall_at,
)


def normal(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clouds(n: int = 120, m: int = 90) -> tuple[torch.Tensor, torch.Tensor]:
    """Two overlapping clouds in 5 dimensions."""
    scales = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0])
    return normal(n, 5, 0), 0.8 * normal(m, 5, 1) * scales + 0.3


# ------------------------------------------------------------ Frechet distance


def test_frechet_distance_of_gaussians_with_known_parameters():
    """N(0, S) and N(mu, R^T S R): features whose sample moments are exact, distance by scipy's sqrtm."""
    x = normal(500, 4, 0)
    x = x - x.mean(0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T  # mean 0, covariance I
    left, right = normal(4, 4, 1), normal(4, 4, 2)
    mean = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    a, b = (left @ left.T).numpy(), (right @ right.T).numpy()
    expected = float(mean @ mean) + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert frechet_distance(white @ left.T, white @ right.T + mean) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(2 * white, white) == pytest.approx(4 * (2 - 1) ** 2, rel=1e-9)  # sum (s - s')^2


def test_frechet_distance_of_fewer_pictures_than_dimensions():
    """A covariance without full rank has a root too."""
    a, b = normal(10, 30, 3), normal(12, 30, 4) + 1
    covariances = np.cov(a.numpy().T), np.cov(b.numpy().T)
    cross = np.trace(scipy.linalg.sqrtm(covariances[0] @ covariances[1] + 1e-12 * np.eye(30)).real)
    expected = float((a.mean(0) - b.mean(0)).square().sum())
    expected += np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * cross
    assert frechet_distance(a.float(), b.float()) == pytest.approx(expected, rel=1e-3)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


# ------------------------------------------------------------ kernel distance


def test_kernel_distance_by_hand():
    """One dimension: k(x, y) = (x y + 1)^3. Pairs of (0, 1): k = 1; of (1, 2): 27; across 1, 1, 8, 27."""
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]])
    assert kernel_distance(a, b) == pytest.approx(1 + 27 - 2 * (1 + 1 + 8 + 27) / 4)


def test_kernel_distance_is_unbiased():
    """Over 300 draws of 20 and 30 points: 0 for one distribution, and the closed form of two in one
    dimension, each within four standard errors. E (x y + 1)^3 = 1 + 3 m m' + 3 s s' + t t' with the first
    three raw moments m, s, t of x and y."""

    def mean_and_error(scale: float, shift: float) -> tuple[float, float]:
        values = torch.tensor(
            [
                kernel_distance(normal(20, 1, 2 * i), scale * normal(30, 1, 2 * i + 1) + shift)
                for i in range(300)
            ]
        )
        return float(values.mean()), float(values.std()) / math.sqrt(300)

    mean, error = mean_and_error(1, 0)
    assert abs(mean) < 4 * error
    mean, error = mean_and_error(0.5, 0.4)
    p, q = (0.0, 1.0, 0.0), (0.4, 0.4**2 + 0.25, 0.4**3 + 3 * 0.4 * 0.25)
    expected = sum(w * (x - y) ** 2 for w, x, y in zip((3, 3, 1), p, q, strict=True))
    assert abs(mean - expected) < 4 * error and error < 0.3 * expected


def test_kernel_distance_sees_more_than_means():
    """Unit vectors scaled to |x|^2 = D, of one mean and another spread; left as they are they look alike."""
    wide, narrow = normal(400, 8, 0), normal(400, 8, 1) * torch.tensor([3.0] * 4 + [0.3] * 4)
    a, b, c = (x / x.norm(dim=1, keepdim=True) for x in (wide, narrow, normal(400, 8, 2)))
    scaled = math.sqrt(8)
    different, same = (kernel_distance(scaled * a, scaled * x) for x in (b, c))
    assert different > 20 * abs(same)


# ------------------------------------------------------------ manifolds


def test_precision_and_recall_by_hand():
    """On a line, k = 1. Real 0, 1, 5: radii 1, 1, 4. Fake 1.5, 2.5, 20: radii 1, 1, 17.5."""
    real, fake = torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([[1.5], [2.5], [20.0]])
    # 1.5 is within 1 of real 1, 2.5 within 4 of real 5, 20 within none; real 0 is 1.5 from the next fake and
    # 20 from the far one, 1 is within 1 of fake 1.5, 5 within 17.5 of fake 20
    assert precision_recall(real, fake, k=1) == pytest.approx((2 / 3, 2 / 3))


def test_density_and_coverage_by_hand():
    """Real 0, 1, 5 with radii 1, 1, 4: fake 1.5 lies in two balls, 2.5 in one, 0.9 in two, 20 in none."""
    real, fake = torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([[1.5], [2.5], [0.9], [20.0]])
    assert density_coverage(real, fake, k=1) == pytest.approx((5 / 4, 1.0))
    assert density_coverage(real, fake[[1, 3]], k=1) == pytest.approx((1 / 2, 1 / 3))


def test_manifolds_against_their_definitions_in_numpy():
    real, fake = clouds()
    x, y = real.numpy(), fake.numpy()

    def radius(points: np.ndarray, i: int, k: int) -> float:
        return sorted(np.linalg.norm(points - points[i], axis=1))[k]  # the first is itself

    def inside(point: np.ndarray, points: np.ndarray, k: int) -> int:
        return sum(np.linalg.norm(point - points[i]) <= radius(points, i, k) for i in range(len(points)))

    precision = np.mean([inside(point, x, 3) > 0 for point in y])
    recall = np.mean([inside(point, y, 3) > 0 for point in x])
    assert precision_recall(real, fake) == pytest.approx((precision, recall))
    density = np.mean([inside(point, x, 5) for point in y]) / 5
    covered = [np.linalg.norm(y - x[i], axis=1).min() <= radius(x, i, 5) for i in range(len(x))]
    assert density_coverage(real, fake) == pytest.approx((density, np.mean(covered)))
    assert 0.2 < precision < 1 and 0.2 < recall < 1 and 0.2 < np.mean(covered) < 1


def test_two_draws_of_one_distribution():
    """Density 1 and coverage 1 - (N-1)..(N-k) / (2N-1)..(2N-k) (Naeem 2020, lemma 2), in any dimension, over
    20 draws within four standard errors."""
    n, k = 100, 5
    pairs = torch.tensor(
        [density_coverage(normal(n, 3, 2 * i), normal(n, 3, 2 * i + 1), k) for i in range(20)]
    )
    density, coverage = pairs.mean(0).tolist()
    errors = (pairs.std(0) / math.sqrt(20)).tolist()
    expected = 1 - math.prod((n - i) / (2 * n - i) for i in range(1, k + 1))
    assert abs(density - 1) < 4 * errors[0] and errors[0] < 0.05
    assert abs(coverage - expected) < 4 * errors[1] and errors[1] < 0.02


def test_points_that_are_there_twice_are_inside():
    """Radii of 0 still hold the point itself."""
    points = normal(6, 3, 0).repeat(4, 1)
    assert precision_recall(points, points) == (1.0, 1.0)
    assert density_coverage(points, points, k=2) == (2.0, 1.0)  # each fake lies in four balls of radius 0


@pytest.mark.parametrize("metric", [frechet_distance, kernel_distance, precision_recall, density_coverage])
def test_shapes_that_do_not_fit_are_refused(metric):
    for a, b in (
        (normal(9, 3, 0), normal(9, 4, 1)),
        (normal(9, 3, 0), normal(1, 3, 1)),
        (normal(9, 3, 0)[0], normal(9, 3, 1)),
    ):
        with pytest.raises(ValueError, match=r"features must be \(N, D\) and \(M, D\) with N, M >= "):
            metric(a, b)
    with pytest.raises(ValueError, match="N, M >= 6, got"):
        density_coverage(normal(5, 2, 0), normal(5, 2, 1))


# ------------------------------------------------------------ other people's


@pytest.mark.metrics
def test_against_torch_fidelity():
    """Frechet distance, KID without subsets, and precision and recall."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    a, b = clouds()
    statistics = [fid_features_to_statistics(x) for x in (a, b)]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-6)
    equal = a[:90]  # theirs takes subsets of one size; a single one of all is no subset
    theirs = kid_features_to_metric(equal, b, kid_subsets=1, kid_subset_size=90, verbose=False)
    assert kernel_distance(equal, b) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    theirs = prc_features_to_metric(b, a, prc_neighborhood=3, verbose=False)  # theirs names the fake first
    assert precision_recall(a, b) == pytest.approx((theirs["precision"], theirs["recall"]))


@pytest.mark.metrics
def test_against_prdc():
    """Naeem's own code."""
    import prdc

    a, b = clouds()
    theirs = prdc.compute_prdc(a.numpy(), b.numpy(), nearest_k=5)
    assert precision_recall(a, b, k=5) == pytest.approx((theirs["precision"], theirs["recall"]))
    assert density_coverage(a, b, k=5) == pytest.approx((theirs["density"], theirs["coverage"]))


# ------------------------------------------------------------ captions, neighbours, intervals


def test_recall_and_clip_score_by_hand():
    ranks = torch.tensor([0, 0, 1, 4, 5, 5, 5, 100])
    assert (recall_at(ranks, 1), recall_at(ranks, 5), recall_at(ranks, 101)) == (0.25, 0.5, 1.0)
    images = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
    texts = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 5.0]])
    assert clip_score(images, texts).tolist() == pytest.approx([60, 0, 100])


def test_nearest_neighbours_one_by_one():
    """2,100 queries cross the batches of 1024; with `own` each picture passes itself over."""
    queries, references = normal(2100, 6, 0), normal(300, 6, 1)
    distances, indices = nearest_neighbours(queries, references)
    for i in (0, 1023, 1024, 2099):
        cosines = [float(queries[i] @ r / (queries[i].norm() * r.norm())) for r in references]
        assert int(indices[i]) == int(np.argmax(cosines))
        assert float(distances[i]) == pytest.approx(1 - max(cosines))
    own = torch.tensor([7, 3, 200])
    distances, indices = nearest_neighbours(references[own], references, own)
    for place, distance, index in zip(own.tolist(), distances.tolist(), indices.tolist(), strict=True):
        cosines = torch.nn.functional.cosine_similarity(references[place : place + 1], references)
        cosines[place] = -2
        assert index == int(cosines.argmax()) and distance == pytest.approx(1 - float(cosines.max()))


def coverage_of(statistic, draw, truth: float, draws: int = 40) -> float:
    """How often the interval of a draw holds the truth."""
    inside = 0
    for i in range(draws):
        low, high = bootstrap_interval(statistic, *draw(i), replicates=60, seed=i)
        inside += low <= truth <= high
    return inside / draws


@pytest.mark.parametrize(
    "statistic, shift",
    [(lambda x: float(x.mean()), None), (frechet_distance, 0.5), (kernel_distance, 0.5)],
    ids=["mean", "Frechet", "kernel"],
)
def test_intervals_hold_what_they_should(statistic, shift):
    """The 95 % interval of a sample of 60 holds the figure's mean over such samples, in at least 80 % of 40
    draws: 95 % less three standard errors and what 60 replicates cost. Its width is that of the figure's own
    spread over such samples."""

    def draw(i: int) -> tuple[torch.Tensor, ...]:
        a = normal(60, 3, 1000 + 2 * i)
        return (a,) if shift is None else (a, 1.3 * normal(60, 3, 1001 + 2 * i) + shift)

    truth = float(np.mean([statistic(*draw(i)) for i in range(1000, 1200)]))
    assert coverage_of(statistic, draw, truth) >= 0.8
    width = np.subtract(*bootstrap_interval(statistic, *draw(0), seed=0)[::-1])
    deviation = float(np.std([statistic(*draw(i)) for i in range(1000, 1200)]))
    assert 0.6 < width / (2 * 1.96 * deviation) < 1.6


def test_intervals_are_wider_at_a_higher_level_and_the_same_again():
    x = normal(50, 1, 0)

    def statistic(y: torch.Tensor) -> float:
        return float(y.mean())

    first = bootstrap_interval(statistic, x, seed=3)
    assert first == bootstrap_interval(statistic, x, seed=3) != bootstrap_interval(statistic, x, seed=4)
    low, high = bootstrap_interval(statistic, x, seed=3, level=0.5)
    assert first[0] < low < high < first[1]
