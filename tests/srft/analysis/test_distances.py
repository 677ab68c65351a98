import numpy as np
import pytest

from srft.analysis.distances import distances, plane
from srft.analysis.reading import divergence, read


def test_points_on_a_plane_are_found_again():
    """Up to rotation: all distances are those that were given, and the first point is the origin."""
    points = np.array([[1.0, 2.0], [4.0, 6.0], [0.0, 0.0], [-3.0, 1.0]])
    squares = ((points[:, None] - points[None]) ** 2).sum(-1)
    found, shown = plane(squares)
    assert found[0].tolist() == [0, 0] and shown == pytest.approx(1)
    assert ((found[:, None] - found[None]) ** 2).sum(-1) == pytest.approx(squares)


def test_what_a_plane_cannot_show_is_told():
    squares = 1 - np.eye(4)  # a tetrahedron: three dimensions of equal size
    assert plane(squares)[1] == pytest.approx(2 / 3)
    assert plane(np.zeros((2, 2)))[1] == 1 and not plane(np.zeros((2, 2)))[0].any()
    assert plane(np.zeros((1, 1)))[0].shape == (1, 2)


def test_distances_of_readings(pair, sequences):
    readings = [read(each, sequences, 16) for each in (*pair, pair[0])]
    found = distances(readings)
    assert found[0, 2] == 0 and (found == found.T).all() and not np.diag(found).any()
    assert found[0, 1] == pytest.approx(float(divergence("jensen_shannon", *readings[:2]).mean()), rel=1e-5)
