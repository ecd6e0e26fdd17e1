"""Slice and pad the updates of sites that train fewer ranks than the plan's adapter has."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from fedtune.core.models.rank_slice import Arrays, trained_slice


def slice_update(arrays: Mapping[str, npt.NDArray[np.float32]], columns: slice) -> Arrays:
    """Return the part of the adapter's `arrays` that a site trains, with the names and shapes of
    the site's update. From an array in which sites train different numbers of columns, take the
    given `columns`; take every other array as a whole."""
    return {
        name: np.ascontiguousarray(trained_slice(name, a, columns)) for name, a in arrays.items()
    }


def pad_update(
    update: Arrays, like: Mapping[str, npt.NDArray[np.float32]], columns: slice
) -> Arrays:
    """Return a site's update in the shapes of the whole adapter `like`: the columns that the site
    did not train are filled with zeros. update: the site's arrays. columns: the columns that
    the site trained, in those arrays of which it trained only a part."""
    padded: Arrays = {}
    for name, array in update.items():
        padded[name] = array
        if array.shape != like[name].shape:
            padded[name] = np.zeros_like(like[name])
            padded[name][:, columns] = array
    return padded
