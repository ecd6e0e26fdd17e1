"""Read a site's records as training does, for people at the site."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedtune.core import modalities
from fedtune.core.bases.find import Base, find_base, load_tokenizer
from fedtune.core.config import Site, Study
from fedtune.core.data.dataset import Dataset
from fedtune.core.data.load import load_dataset
from fedtune.core.data.reader import Reader
from fedtune.core.registry import process_cache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_data(site: Site, study: Study, base: Base | None = None) -> Dataset:
    """Check that the site's records fit the study, and return the dataset that training would read;
    only the site may know the result. base: the base to use. By default it is site.base or, if this
    is not set, the base that the study names; leave it out only for a study of one's own.

    Errors: DataError."""
    base = base or find_base(site.site.base or study.base.model, study.base.digest)
    tokenizer, reader = reading_of(base, study.base.modality)
    return load_dataset(site.data, study, tokenizer, reader=reader)


@process_cache.cached("readers")
def reading_of(base: Base, modality: str | None) -> tuple[PreTrainedTokenizerBase, Reader]:
    """Load a base's tokenizer, and the reader that turns a site's files into the base's inputs.
    Return both. They are loaded once, and shared by all simulated sites. modality: the study's
    base.modality; None for the modality that fits the base's kind."""
    tokenizer = load_tokenizer(base)
    return tokenizer, modalities.reader(base, tokenizer, modality)
