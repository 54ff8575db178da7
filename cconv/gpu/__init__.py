"""The GPU twin's door: the twin's names, each of which says clearly that no kernels stand behind it yet.

In: a Plan and Weights.  Out: BackendUnavailable. CUDA is never touched.
"""

from ..errors import BackendUnavailable
from ..planning import Machine, Plan
from ..weights import Weights

name = "gpu"


def _unavailable(*_):
    raise BackendUnavailable("gpu: this version of cconv has no GPU kernels; pass a NumPy array to use the CPU")


def machine() -> Machine:
    return _unavailable()


def asarray(array):
    return _unavailable(array)


def to_numpy(array):
    return _unavailable(array)


def synchronize() -> None:
    _unavailable()


def build(plan: Plan, weights: Weights):
    return _unavailable(plan, weights)
