"""Why something is left alone: a refusal is a value with a reason code, a sentence and the layer it is about.

Laws refuse by raising :class:`RefusalError`; the driver that called the law turns it into a
:class:`Refusal` that names the layer, so the explanation always comes from the code that decided.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

__all__ = ["PROBED", "UNREAD", "Reason", "Refusal", "RefusalError", "ReparamError"]


class ReparamError(ValueError):
    """Bad input or a failed proof; the message names the layer and the fix. Nothing was changed."""


class Reason(Enum):
    """Reason codes. The value is the short text that tables print."""

    NOT_AFFINE = "not an affine operation"
    OTHER_INPUT = "depends on another input as well"
    BORDER = "zero padding between two kernels is not exact at the border"
    PAD_VALUE = "pad value is not the map's value at a zero input"
    PAD_MODE = "padding modes do not combine"
    GEOMETRY = "strides or output sizes of the branches differ"
    TRANSPOSED = "only per-channel maps combine with a transposed convolution"
    CHANNELS = "channel counts do not match"
    BATCH_STATISTICS = "batch norm without running statistics uses the batch's own"
    CEIL_MODE = "ceil_mode makes windows of different sizes"
    PAD_NOT_COUNTED = "average pooling that does not count its padding is not a convolution"
    PAD_COUNTED = "average pooling that counts its padding, or divides otherwise, passes on no shift at the border"
    NOT_PER_CHANNEL = "scale or shift varies within a channel"
    LAYOUT = "moves data in a way that is not a channel permutation, a crop or a pad"
    RANK_UNKNOWN = "number of dimensions unknown; pass example_inputs"
    CAST = "changes the dtype or the device"
    ATTRIBUTE = "an option of this layer is not understood"
    LARGER = "one convolution would cost more than the layers it replaces"
    FUSED = "part of what runtimes recognise and run as one operator"
    SHARED = "used from more than one place"
    HOOK = "has a hook that would no longer run"
    IN_PLACE = "a tensor is changed in place while still in use"
    HELD = "is called or held past the place where it is registered"
    CODE = "the surrounding code cannot be rewritten"
    NOT_A_CONVOLUTION = "probed: does not act as a convolution"
    UNTRACEABLE = "cannot be traced"
    QUESTION = "asks a value for what a trace cannot know"
    INPUT_TYPE = "asks for the type of its input, which may be anything"
    STATE = "keeps something between calls"
    RANDOM = "draws from a random generator that is not torch's"
    EFFECT = "its forward does more than compute its result"
    CONTEXT = "its forward enters a context"
    NO_CONVOLUTION = "no convolution or linear layer directly before it"
    NO_LAYER_BEHIND = "no layer behind it takes it over"
    BEHIND_NORM = "behind a norm that uses statistics of its input"
    BLOCK = "the block does not apply to this convolution"
    NOT_SELECTED = "not selected"
    KERNEL_OF_ONE = "a kernel of one tap"
    NOT_MEANT = "the block is meant for other kernels"
    COMPUTED = "its weight is computed by a parametrization"
    OWN_FORWARD = "its class does more than convolve"
    ONE_KERNEL = "its class computes its kernel from its weight, which no sum of branches goes through"
    ARGUMENT = "an optional argument changes what uses it"
    MODES = "training and evaluation use it differently"
    NEVER_CALLED = "nothing calls it"
    NOT_RUN = "its block would never run"
    DIFFERS = "with its block the network computes something else"
    NOT_FINITE = "the result is not finite"
    OVER_BUDGET = "over the budget"
    TAKEN_BACK = "taken back: it does not hold"


UNREAD = frozenset((Reason.UNTRACEABLE, Reason.QUESTION, Reason.INPUT_TYPE, Reason.STATE, Reason.RANDOM, Reason.EFFECT))
"""Why a module's forward was not read; what is inside it is compiled on its own."""

PROBED = UNREAD - {Reason.STATE, Reason.RANDOM}
"""Of these, what may act as a convolution all the same: the same call gives the same result."""


@dataclass(frozen=True)
class Refusal:
    """One thing that was left alone: the reason code, a sentence with what was wanted and got, the layer."""

    reason: Reason
    message: str
    layer: str = ""

    def at(self, layer: str) -> Refusal:
        """The same refusal, about ``layer``; a layer already named is kept."""
        return self if self.layer else replace(self, layer=layer)

    def __str__(self) -> str:
        return f"{self.layer or '(model)'}: {self.message}"


class RefusalError(ValueError):
    """Raised by a law that does not hold; carries the :class:`Refusal`."""

    def __init__(self, reason: Reason, message: str = "", layer: str = "") -> None:
        self.refusal = Refusal(reason, message or reason.value, layer)
        super().__init__(str(self.refusal))
