"""Running real code on tensors that have shapes but no storage, and writing down what it would have needed.

Weights become torch's `FakeTensor`s, which take part in every operation, autograd included, and hold nothing. Ids,
masks and other tensors that meet no weight stay real, so that code which looks into them (how long is this completion?)
runs as it does in training. A number that only weights could tell is answered with one: finite, true, 1.
"""

import math
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
_ASKED = {torch.bool: True}  # answers by dtype; every other dtype's is 1
_KINDS = {"convolution": "conv", "scaled_dot_product": "attention", "mm": "matmul"}
_LOOK_UP = ("embedding", "index", "gather", "scatter")  # these touch what they give, not the table they read from


@dataclass(frozen=True)
class Operation:
    """What one operation costs: its kind, its dtype, floating-point operations, bytes read and written."""

    kind: str  # matmul, conv, attention or other
    dtype: torch.dtype
    flops: int
    moved: int
    rows: int = 0  # of a product's smaller side, queries of an attention, places of a convolution: few are slow


@dataclass(frozen=True)
class Cost:
    """What some code needs: the most bytes that it holds at once beyond the weights, and its operations."""

    peak: int
    operations: Mapping[Operation, float]

    @property
    def flops(self) -> float:
        """Floating-point operations, two for a multiplication with addition."""
        return sum(operation.flops * times for operation, times in self.operations.items())

    def times(self, count: float) -> "Cost":
        """The same, `count` times one after the other."""
        return Cost(self.peak, {operation: times * count for operation, times in self.operations.items()})

    def less(self, other: "Cost") -> "Cost":
        """Without the operations of what came before."""
        rest = Counter(self.operations)
        rest.subtract(other.operations)
        return Cost(self.peak, +rest)

    def then(self, other: "Cost") -> "Cost":
        """This and then the other."""
        return Cost(max(self.peak, other.peak), Counter(self.operations) + Counter(other.operations))


NOTHING = Cost(0, {})


class Trace(TorchDispatchMode):
    """`with Trace(weights) as trace: work()`, then `trace.cost`.

    Args:
        weights: tensors that are there already, and are not counted.
    """

    def __init__(self, weights: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self._held: dict[int, weakref.finalize] = {}
        self._live = self._peak = 0
        self._operations: Counter[Operation] = Counter()
        self._there = [tensor.untyped_storage() for tensor in weights]
        self._known = {storage._cdata for storage in self._there}

    @property
    def cost(self) -> Cost:
        """What was needed so far."""
        return Cost(self._peak, dict(self._operations))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "prim":  # asks what a tensor is, and computes nothing
            return func(*args, **(kwargs or {}))
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        fakes = [tensor for tensor in given if isinstance(tensor, FakeTensor)]
        if fakes and func in (aten._local_scalar_dense.default, aten.equal.default):
            return _answer(fakes[0].dtype if func is aten._local_scalar_dense.default else torch.bool)
        if 0 < len(fakes) < len(given):
            args, kwargs = _lifted(func, args, kwargs, fakes[0].fake_mode)
        result = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        for tensor in made:
            self._hold(tensor.untyped_storage())
        if made and not func.is_view:
            operation = _operation(func, args, kwargs, result, given, made)
            self._operations[operation] += 1
            if operation.kind == "conv":  # it lays its input out anew, for as long as it runs
                self._peak = max(self._peak, self._live + _bytes(given[0]))
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        """Count a storage for as long as it lives."""
        key = storage._cdata
        if key in self._known or key in self._held:
            return
        size = storage.nbytes()
        self._live += size
        self._peak = max(self._peak, self._live)
        self._held[key] = weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._live -= size
        del self._held[key]


def _operation(
    func, args: tuple, kwargs: dict, result: object, given: list[torch.Tensor], made: list[torch.Tensor]
) -> Operation:
    """What an operation costs, from the tensors that went in and came out."""
    name = func._overloadpacket.__name__
    touched = made * 2 if name.startswith(_LOOK_UP) else given + made
    moved = sum(map(_bytes, touched))
    formula = flop_registry.get(func._overloadpacket)
    flops = int(formula(*args, **kwargs, out_val=result)) if formula else 0
    kind = next((kind for part, kind in _KINDS.items() if part in name), "other") if flops else "other"
    floating = next((tensor.dtype for tensor in made if tensor.dtype.is_floating_point), torch.float32)
    return Operation(kind, floating, flops, moved, _rows(kind, given, made))


def _rows(kind: str, given: list[torch.Tensor], made: list[torch.Tensor]) -> int:
    """What the speed of a product goes by."""
    if kind == "matmul":
        return min(math.prod(tensor.shape[-2:-1]) for tensor in given if tensor.dim() >= 2)
    if kind == "attention":
        return given[0].shape[-2]
    return made[0].numel() // made[0].shape[1] if kind == "conv" else 0


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def weightless(model: torch.nn.Module, mode: FakeTensorMode) -> torch.nn.Module:
    """The model, built on the meta device, with parameters that computing can be tried on; tied ones stay tied."""
    made: dict[int, torch.nn.Parameter] = {}
    with mode:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = made.setdefault(id(parameter), _empty(parameter))
    return model


def _empty(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    values = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
    return torch.nn.Parameter(values, requires_grad=parameter.requires_grad)


def _answer(dtype: torch.dtype) -> bool | int | float:
    """What a number that is not known is taken for: true, 1."""
    if dtype is torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


def _lifted(func, args: tuple, kwargs: dict, mode: FakeTensorMode) -> tuple[tuple, dict]:
    """The arguments with real tensors made fake, where a mask that picks values first becomes their places."""
    if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
        args = (args[0], _places(args[1]), *args[2:])

    def lift(leaf: object) -> object:
        known = not isinstance(leaf, torch.Tensor) or isinstance(leaf, FakeTensor)
        return leaf if known else mode.from_tensor(leaf, static_shapes=True)

    return tree_map(lift, args), tree_map(lift, kwargs)


def _places(indices: Iterable[torch.Tensor | None]) -> list[torch.Tensor | None]:
    places: list[torch.Tensor | None] = []
    for index in indices:
        is_mask = index is not None and index.dtype is torch.bool and not isinstance(index, FakeTensor)
        places += index.nonzero(as_tuple=True) if is_mask else [index]
    return places
