"""The accumulator: a provider's chunks in, one output and the deltas that lead to it out.

In: decoded chunks, from the stream reader.  Out: normalised deltas, ready to publish, and at any time
the whole output; to the reader.  Exists so that one place knows how providers deviate from the
documented chunk, and so that the rest of Keepstream never sees it.

Two promises hold at every moment: joining the deltas given out so far gives the output, byte for
byte; and every text is fit to be stored, without NUL and without halves of surrogate pairs.
"""

from keepstream_worker.providers.accumulator.accumulator import Accumulator, Limits, Output
from keepstream_worker.values import Delta

__all__ = ["Accumulator", "Delta", "Limits", "Output"]
