"""A head from one noised release of class statistics."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from fedtune.core.errors import ConfigError
from fedtune.strategies._posterior import (
    WEIGHT,
    Basis,
    Head,
    Noised,
    Public,
    choose,
    directions_for,
    features,
    head,
    summarise_public,
)

Array = npt.NDArray[np.float64]
CLASSES, WIDTH = 6, 40
DIRECTIONS = 20
MISSING = 5  # the class that public records lack
NONE = np.full(30, -1)


class World:
    """Vectors of CLASSES classes in WIDTH dimensions, of which ten tell classes apart."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.means = np.zeros((CLASSES, WIDTH))
        self.means[:, :10] = self.random.standard_normal((CLASSES, 10))
        self.widths = np.linspace(1.0, 0.2, WIDTH)
        self.names = self.means + 0.5 * self.random.standard_normal(self.means.shape)

    def records(self, count: int, classes: int = CLASSES) -> tuple[Array, npt.NDArray[np.int64]]:
        labels = self.random.integers(0, classes, count)
        noise = self.random.standard_normal((count, WIDTH))
        return self.means[labels] + self.widths * noise, labels


def release(
    basis: Basis, vectors: Array, labels: npt.NDArray[np.int64], deviation: float, seed: int = 1
) -> Noised:
    """What the sites release of vectors, one record a unit."""
    columns = np.full((len(vectors), 1), basis.weight)
    sums = np.zeros((CLASSES, basis.released + 1))
    np.add.at(sums, labels, np.concatenate([features(basis, vectors), columns], axis=1))
    noise = deviation * np.random.default_rng(seed).standard_normal(sums.shape)
    return Noised(sums + noise, deviation, units=len(vectors))


def right(fitted: Head, vectors: Array, labels: npt.NDArray[np.int64]) -> Array:
    """Whether the head is right about each record."""
    found = (vectors @ fitted.weight.T + fitted.bias).argmax(axis=1)
    return np.asarray(found == labels, dtype=np.float64)


def start(world: World) -> tuple[Basis, Public]:
    """A basis and public statistics of 30 labelled records, none of the class MISSING."""
    vectors, labels = world.records(30, MISSING)
    basis = choose(vectors, world.names, DIRECTIONS, WEIGHT)
    return basis, summarise_public(basis, vectors, labels, CLASSES, world.names)


def test_features_are_of_length_one_at_most() -> None:
    world = World()
    basis, _ = start(world)
    lengths = np.linalg.norm(features(basis, 100 * world.records(50)[0]), axis=1)
    assert lengths.max() <= 1 + 1e-12
    assert basis.norm == pytest.approx(np.hypot(1, basis.weight))


def test_the_release_improves_on_public_records_and_teaches_the_class_that_they_lack() -> None:
    world = World()
    basis, known = start(world)
    fitted = head(release(basis, *world.records(600), deviation=2.0), basis, known)
    nothing = head(Noised(np.zeros((CLASSES, basis.released + 1)), 1e9, 600), basis, known)
    vectors, labels = world.records(2000)
    assert right(fitted, vectors, labels).mean() > right(nothing, vectors, labels).mean() + 0.05
    missing = labels == MISSING
    assert right(fitted, vectors[missing], labels[missing]).mean() > 0.6
    assert (fitted.figures.public | fitted.figures.evident).all()
    assert not nothing.figures.public[MISSING] and not nothing.figures.evident[MISSING]


def test_a_release_that_is_all_noise_leaves_the_public_head() -> None:
    """The twin takes the noise for a hundredth of what it is, and is worse for it."""
    world = World()
    basis, known = start(world)
    heard = release(basis, *world.records(600), deviation=1e3)
    nothing = Noised(np.zeros_like(heard.sums), 1e9, 600)
    vectors, labels = world.records(2000)
    told, alone, untold = (
        right(head(noised, basis, known), vectors, labels).mean()
        for noised in (heard, nothing, replace(heard, deviation=10.0))
    )
    assert told >= alone - 0.02
    assert untold < alone - 0.1


def test_without_labels_names_are_what_the_means_begin_at() -> None:
    world = World()
    vectors, _ = world.records(30)
    basis = choose(vectors, world.names, DIRECTIONS, WEIGHT)
    known = summarise_public(basis, vectors, NONE, CLASSES, world.names)
    nameless = summarise_public(basis, vectors, NONE, CLASSES, None)
    few = release(basis, *world.records(20), deviation=2.0)
    vectors, labels = world.records(2000)
    named = right(head(few, basis, known), vectors, labels).mean()
    assert named > right(head(few, basis, nameless), vectors, labels).mean() + 0.2
    exact = release(basis, *world.records(2000), deviation=0.0)
    assert right(head(exact, basis, nameless), vectors, labels).mean() > 0.8


def test_names_that_say_nothing_are_not_believed() -> None:
    world = World()
    vectors, labels = world.records(200)
    lies = np.roll(world.names, 1, axis=0)
    basis = choose(vectors, lies, DIRECTIONS, WEIGHT)
    silent = Noised(np.zeros((CLASSES, basis.released + 1)), 1e9, 600)
    heads = [
        head(silent, basis, summarise_public(basis, vectors, labels, CLASSES, names))
        for names in (lies, None)
    ]
    vectors, labels = world.records(2000)
    deceived, nameless = (right(each, vectors, labels).mean() for each in heads)
    assert deceived >= nameless - 0.02


def test_counts_are_units_and_their_noise_is_known() -> None:
    world = World()
    basis, known = start(world)
    vectors, labels = world.records(600)
    exact = head(release(basis, vectors, labels, deviation=0.0), basis, known).figures
    assert exact.count == pytest.approx(np.bincount(labels, minlength=CLASSES))
    noised = head(release(basis, vectors, labels, deviation=2.0), basis, known).figures
    assert noised.deviation == pytest.approx(2.0 / basis.weight)
    assert np.abs(noised.count - exact.count).max() < 5 * noised.deviation


def test_more_noise_takes_fewer_directions() -> None:
    kept = [directions_for(20, 100, noise, units=600) for noise in (0.1, 1.0, 10.0, 100.0)]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > 80
    assert kept[-1] < 20


def test_directions_are_those_that_records_and_names_can_span() -> None:
    assert directions_for(20, 0, 0.001, units=600) <= 19
    assert directions_for(20, 10, 0.001, units=600, named=False) <= 9
    with pytest.raises(ConfigError, match="no direction"):
        directions_for(20, 1, 1.0, units=600, named=False)


def test_names_alone_span_a_basis() -> None:
    world = World()
    nobody = np.empty((0, WIDTH))
    basis = choose(nobody, world.names, CLASSES - 1, WEIGHT)
    known = summarise_public(basis, nobody, np.empty(0, dtype=np.int64), CLASSES, world.names)
    fitted = head(release(basis, *world.records(600), deviation=2.0), basis, known)
    assert right(fitted, *world.records(2000)).mean() > 0.6


@pytest.mark.parametrize("count", [1, 2])
def test_hardly_any_public_records_are_enough_beside_names(count: int) -> None:
    world = World()
    vectors, labels = world.records(count)
    basis = choose(vectors, world.names, CLASSES - 1, WEIGHT)
    known = summarise_public(basis, vectors, labels, CLASSES, world.names)
    fitted = head(release(basis, *world.records(600), deviation=2.0), basis, known)
    assert np.isfinite(fitted.weight).all()
    assert np.isfinite(fitted.bias).all()
    assert right(fitted, *world.records(2000)).mean() > 0.6


def test_records_that_do_not_differ_are_refused() -> None:
    with pytest.raises(ConfigError, match="span 0 directions"):
        choose(np.ones((3, WIDTH)), None, 1, WEIGHT)
