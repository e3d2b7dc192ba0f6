"""What a check says: a property of an answer holds, or what was expected, what came, and why.

A check of exercise 3 is a file with two names (exercises/checks/ex03.py; hidden checks are another
such file):

    FORBIDDEN = ("lire",)                       modules that hold the answer
    PROPERTIES = [Property("...", points, function), ...]

A property's function is given the answer, a module, and raises Wrong where it does not hold. The
cause is found by imitation: every plausible mistake is computed too, and the one that gives the
student's numbers is named. Where none does, and a property that is named in `after` does not hold
either, the student is sent there: whoever mends a value often mends its gradient too.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch


class Property(NamedTuple):
    """Something that a right answer does, and what it is worth."""

    name: str
    points: int
    holds: Callable[[ModuleType], None]  # raises Wrong where it does not
    after: tuple[str, ...] = ()  # names of properties that ask the same function


class Wrong(Exception):
    """A property does not hold."""

    def __init__(self, expected: Any, got: Any, cause: str = "") -> None:
        """expected, got: shown; cause: the likeliest one, a sentence to the student."""
        super().__init__(cause)
        self.expected, self.got, self.cause = shown(expected), shown(got), cause


NO_USUAL = "no usual mistake gives these numbers"
UNKNOWN = f"{NO_USUAL}: go through the worked example by hand"


def shown(value: Any) -> str:
    """A value in at most 300 characters."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.double().numpy() if value.is_floating_point() else value.numpy()
    if isinstance(value, np.ndarray):
        if value.dtype.kind == "f":
            value = np.where(np.abs(value) < 5e-5, 0.0, value)  # no -0.
        text = np.array2string(value, precision=4, suppress_small=True, threshold=40, separator=" ")
        text = " ".join(text.split())
    else:
        text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 300 else text[:297] + "..."


def as_array(got: Any, shape: Sequence[int]) -> np.ndarray:
    """What the student returned, as float64.

    Raises: Wrong where it is no tensor, or of another shape.
    """
    if not isinstance(got, torch.Tensor):
        raise Wrong(f"a tensor {list(shape)}", repr(got), not_a("tensor", got))
    if list(got.shape) != list(shape):
        raise Wrong(f"a tensor {list(shape)}", f"a tensor {list(got.shape)}", SHAPES)
    return got.detach().cpu().double().numpy()


def not_a(kind: str, got: Any) -> str:
    """What to say of a result of another type."""
    if got is None:
        return "nothing is returned"
    return f"a {kind} is asked for, not a {type(got).__name__}"


SHAPES = "another shape: which axis is summed over, and is one kept (keepdim) that should go?"


def same(
    got: Any,
    expected: Any,
    mistakes: dict[str, Any] | None = None,
    tolerance: float = 1e-4,
    unknown: str = UNKNOWN,
    odd: str = "nan or inf: something is divided by 0, or a log is of 0",
    what: str = "",
) -> None:
    """Is what the student returned what was expected?

    Args: expected: numbers; mistakes {sentence: numbers that this mistake gives}, the likeliest
        first; tolerance: relative to the largest number expected; unknown: the sentence where no
        mistake gives the student's numbers; odd: where one of them is nan or inf; what: said before
        the numbers, where they are not what the function returns.
    Raises: Wrong.
    """
    expected = np.asarray(expected, float)
    value = as_array(got, expected.shape)
    size = tolerance * max(1.0, float(np.abs(expected).max(initial=0.0)))

    def near(numbers):
        numbers = np.asarray(numbers, float)
        return numbers.shape == value.shape and np.allclose(
            value,
            numbers,
            rtol=0,
            atol=size,  # nan is not near to nan: it has many causes
        )

    if near(expected):
        return
    causes = (sentence for sentence, numbers in (mistakes or {}).items() if near(numbers))
    cause = next(causes, unknown if np.isfinite(value).all() else odd)
    raise Wrong(*(f"{what} {shown(x)}".strip() for x in (expected, value)), cause)


def gradient_of(function: Callable[..., Any], at: torch.Tensor) -> np.ndarray:
    """The gradient of a sum of function(at) [...].

    Raises: Wrong where nothing reaches `at`.
    """
    at = at.detach().clone().requires_grad_()
    result = function(at)
    if not isinstance(result, torch.Tensor):
        raise Wrong("a tensor with a gradient", repr(result), not_a("tensor", result))
    if not result.requires_grad:
        raise Wrong("a result with a gradient", result, "the result has no gradient: detach, item?")
    (gradient,) = torch.autograd.grad(result.sum(), at, allow_unused=True)
    return np.zeros(at.shape) if gradient is None else gradient.double().numpy()


def same_number(
    got: Any,
    expected: float,
    mistakes: dict[str, float] | None = None,
    tolerance: float = 1e-4,
    unknown: str = UNKNOWN,
) -> None:
    """`same` for a single number: a float, an int, or a tensor that holds one.

    Raises: Wrong.
    """
    is_number = isinstance(got, (int, float, np.number)) and not isinstance(got, bool)
    if not is_number and not (isinstance(got, torch.Tensor) and got.numel() == 1):
        raise Wrong("a number", repr(got), not_a("number", got))
    same(torch.tensor(float(got), dtype=torch.float64), expected, mistakes, tolerance, unknown)


def odd_number(given: dict[str, Any], whole: Sequence[str]) -> str:
    """The first of the settings that is no number, or one of `whole` that is no whole number.

    Returns: what to say of it; empty where all are as they should be.
    """
    for name, value in given.items():
        kinds, words = (int, float), "a number"
        if name in whole:
            kinds, words = (int,), "a whole number"
        if isinstance(value, bool) or not isinstance(value, kinds):
            return f"{name} is {value!r}: {words} is asked for"
    return ""


def inputs(function: FunctionType, given: tuple, named: dict[str, Any]) -> str:
    """What a function is called with, "rest = 0.1, T = 2.0"; of large tensors their shapes.

    Returns: empty where there are none, or the function takes other arguments.
    """
    try:
        named = inspect.signature(function).bind(*given, **named).arguments
    except TypeError:
        return ""
    words = []
    for name, value in named.items():
        if isinstance(value, torch.Tensor) and value.numel() > 7:
            words.append(f"{name} {list(value.shape)}")
        elif isinstance(value, (torch.Tensor, int, float)) or (
            isinstance(value, str) and value.isidentifier()  # and no path
        ):
            words.append(f"{name} = {shown(value)}")
    return shown(", ".join(words))


class Watched:
    """An answer whose functions note what they are given, and what of that they change in place.

    Every other attribute is the answer's own.
    """

    def __init__(self, answer: ModuleType) -> None:
        """answer: a student's module."""
        self._answer = answer
        self.forget()

    def forget(self) -> None:
        """Begin anew: changed, names of functions; given, of the last call, as `inputs` has it."""
        self.changed, self.given = [], ""

    def __getattr__(self, name: str) -> Any:
        """A function of the answer, watched; or what else stands there."""
        found = getattr(self._answer, name)
        if not isinstance(found, FunctionType):
            return found

        @functools.wraps(found)
        def function(*given, **named):
            tensors = [x for x in (*given, *named.values()) if isinstance(x, torch.Tensor)]
            before = [x._version for x in tensors]  # of torch: it counts writes
            self.given = inputs(found, given, named)
            result = found(*given, **named)
            if [x._version for x in tensors] != before and name not in self.changed:
                self.changed.append(name)
            return result

        return function


AUTOGRAD = "autograd is used: here the derivative is worked out on paper and written as a formula"


@contextmanager
def by_hand() -> Iterator[None]:
    """Inside, no answer can let torch differentiate.

    Raises: Wrong as soon as torch saves a tensor for a backward pass, or makes one for a forward
        derivative.
    """

    def refuse(*saved):
        raise Wrong("a formula, derived by hand", "a call of autograd", AUTOGRAD)

    hooks = torch.autograd.graph.saved_tensors_hooks(refuse, refuse)
    try:
        with hooks, patch.object(torch.autograd.forward_ad, "make_dual", refuse):
            yield
    except RuntimeError as e:
        if "saved tensor hooks" not in str(e):  # what torch.func says of the hooks above
            raise
        raise Wrong("a formula, derived by hand", "a call of torch.func", AUTOGRAD) from None
