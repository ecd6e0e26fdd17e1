"""Look for words near an identifier that make it more certain, in bounded time.

presidio raises the score of what its recognisers of numbers find if a word such as "ssn" is among
the last words before it. For each find it searches all tokens of the text for the find's place, and
then goes back through the tokens before it, and looks up each in a list of all words of the text.
In a text made for that, such as "::" thousands of times, this takes hours. `NearContext` finds the
place by bisection, goes back at most NEAR tokens, and looks words up in a set.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from typing import TYPE_CHECKING, Any

from presidio_analyzer.context_aware_enhancers import LemmaContextAwareEnhancer

if TYPE_CHECKING:
    from presidio_analyzer import EntityRecognizer, RecognizerResult
    from presidio_analyzer.nlp_engine import NlpArtifacts

NEAR = 50  # tokens before and after an identifier, from which presidio takes the five nearest words


class NearContext(LemmaContextAwareEnhancer):
    """Raises scores as presidio's enhancer does. The results differ only where presidio would take
    a word that is more than NEAR tokens away from an identifier."""

    def enhance_using_context(
        self,
        text: str,
        raw_results: list[RecognizerResult],
        nlp_artifacts: NlpArtifacts,
        recognizers: list[EntityRecognizer],
        context: list[str] | None = None,
    ) -> list[RecognizerResult]:
        """Return `raw_results`, in which the score of each identifier that has a supporting word
        near it is raised. Arguments: as presidio's enhancer takes them."""
        known: Any = copy.copy(nlp_artifacts)
        known.keywords = frozenset(known.keywords)  # it is asked for each token near each result
        found: list[RecognizerResult] = super().enhance_using_context(
            text, raw_results, known, recognizers, context
        )
        return found

    def _extract_surrounding_words(
        self, nlp_artifacts: NlpArtifacts, word: str, start: int
    ) -> list[str]:
        """Return the lemmas of the words around an identifier.

        - nlp_artifacts: the text's tokens, their places and lemmas, and its words
        - word: the identifier; only presidio's own code needs it
        - start: where it begins, in characters"""
        tokens: Any = nlp_artifacts.tokens
        if not tokens:
            return [""]
        places = nlp_artifacts.tokens_indices
        at = max(bisect_right(places, start) - 1, 0)
        if at + 1 < len(places) and start >= places[at] + len(tokens[at]):
            at += 1  # between two tokens: the later one
        first = max(at - NEAR, 0)
        near = nlp_artifacts.lemmas[first : at + NEAR + 1]
        keywords: Any = nlp_artifacts.keywords
        before = self._add_n_words_backward(at - first, self.context_prefix_count, near, keywords)
        after = self._add_n_words_forward(at - first, self.context_suffix_count, near, keywords)
        return list({*before, *after})
