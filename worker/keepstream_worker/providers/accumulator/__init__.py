"""The accumulator: builds the output from a provider's chunks, and the normalised deltas that lead to it.

In: decoded chunks, from the stream reader.
Out: deltas ready to publish, and at any time the output so far, to the stream reader.

Only this package knows how providers deviate from the documented chunk. Two invariants always hold: the deltas
returned so far, joined, equal the output, byte for byte; and every text can be stored: no NUL, no lone surrogates.
"""

from keepstream_worker.providers.accumulator.accumulator import Accumulator, Output
from keepstream_worker.providers.accumulator.bounds import Limits
from keepstream_worker.values import Delta

__all__ = ["Accumulator", "Delta", "Limits", "Output"]
