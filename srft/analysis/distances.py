"""A map of models: points on a plane whose distances are those of what the models say."""

from collections.abc import Sequence

import numpy as np

from srft.analysis.reading import Reading, divergence


def distances(readings: Sequence[Reading]) -> np.ndarray:
    """(M, M) mean Jensen-Shannon divergence of each two on the same tokens, nats."""
    found = np.zeros((len(readings), len(readings)))
    for i, one in enumerate(readings):
        for j in range(i):
            found[i, j] = found[j, i] = float(divergence("jensen_shannon", one, readings[j]).double().mean())
    return found


def plane(squares: np.ndarray) -> tuple[np.ndarray, float]:
    """Classical scaling: points (M, 2), the first at the origin, and the share of squared distances they show.

    squares: (M, M). A Jensen-Shannon divergence is the square of a distance in a Euclidean space.
    """
    count = len(squares)
    centre = np.eye(count) - 1 / count
    values, vectors = np.linalg.eigh(-centre @ squares @ centre / 2)
    values = values.clip(0)
    points = vectors[:, ::-1][:, :2] * np.sqrt(values[::-1][:2])
    points = np.pad(points, ((0, 0), (0, 2 - points.shape[1])))
    total = values.sum()
    return points - points[0], float(values[::-1][:2].sum() / total) if total else 1.0
