"""Running real code on tensors that have shapes but no storage, and writing down what it would have needed.

Weights become tensors of torch's meta device, which hold nothing, and say that they are on the CPU. Ids, masks and
other tensors that meet no weight stay real, so that code which looks into them runs as in training. A number that only
weights could tell is taken for 1, or true. torch's own `FakeTensor` does the same, and takes four times as long.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
KINDS = {"convolution": "conv", "scaled_dot_product": "attention", "mm": "matmul"}
_CPU = torch.device("cpu")
_SEEN: dict[tuple, list[tuple]] = {}  # a function and the forms of its arguments → the forms of what it gave
_LOOK_UP = ("embedding", "index", "gather", "scatter")  # these touch what they give, not the table they read from


@dataclass(frozen=True)
class Operation:
    """What one operation costs."""

    kind: str  # matmul, conv, attention or other
    dtype: torch.dtype
    flops: int  # floating-point operations
    moved: int  # bytes read and written
    rows: int = 0  # of a product's smaller side, queries of an attention, places of a convolution: few are slow


Log = list[tuple[Operation, int]]  # operations in their order, each with the bytes that are held while it runs


@dataclass(frozen=True)
class Cost:
    """What some code needs: the most bytes that it holds at once beyond the weights, and its operations."""

    peak: int
    operations: Mapping[Operation, float]

    @classmethod
    def of(cls, log: "Log") -> "Cost":
        """That of some operations in their order."""
        return cls(max((held for _, held in log), default=0), Counter(operation for operation, _ in log))

    @property
    def flops(self) -> float:
        """Floating-point operations, two for a multiplication with addition."""
        return sum(operation.flops * times for operation, times in self.operations.items())

    def times(self, count: float) -> "Cost":
        """The same, `count` times one after the other."""
        return Cost(self.peak, {operation: times * count for operation, times in self.operations.items()})

    def then(self, other: "Cost") -> "Cost":
        """This and then the other; without the other's operations where it was taken `times(-1)`."""
        return Cost(max(self.peak, other.peak), Counter(self.operations) + Counter(other.operations))


def cost_of(work: Callable[[], object], there: Iterable[torch.Tensor] = ()) -> Cost:
    """What a call needs, beyond the tensors that are `there` already."""
    with Trace(there) as trace:
        work()
    return trace.cost


def cost_of_repetition(number: int, first: Log, second: Log) -> Cost:
    """What the `number`th repetition of some code needs, whose sizes all grow by as much from each to the next.

    Args:
        first, second: what its first and its second repetition did, operation by operation.
    """
    peak, operations = 0, Counter()
    for (one, held), (other, held_later) in zip(first, second, strict=True):
        before, after = (one.flops, one.moved, one.rows, held), (other.flops, other.moved, other.rows, held_later)
        flops, moved, rows, held = (a + (number - 1) * (b - a) for a, b in zip(before, after, strict=True))
        peak = max(peak, held)
        operations[replace(one, flops=flops, moved=moved, rows=rows)] += 1
    return Cost(peak, operations)


class Trace(TorchDispatchMode):
    """`with Trace(weights) as trace: work()`, then `trace.cost`; `trace.log` has its operations in their order.

    Args:
        weights: tensors that are there already, and are not counted.
        answer: what a truth value that only weights could tell is taken for.
    """

    def __init__(self, weights: Iterable[torch.Tensor] = (), answer: bool = True) -> None:
        super().__init__()
        self.log: Log = []
        self._live = 0
        self._answer = answer
        self._known: dict[int, object] = {(own := tensor.untyped_storage())._cdata: own for tensor in weights}

    @property
    def cost(self) -> Cost:
        """What was needed so far."""
        return Cost.of(self.log)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return _CPU
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        weightless = [tensor for tensor in given if isinstance(tensor, Weightless)]
        if weightless and func is aten.equal.default:
            return self._answer
        if weightless and func is aten._local_scalar_dense.default:
            dtype = weightless[0].dtype
            return self._answer if dtype is torch.bool else 1.0 if dtype.is_floating_point else 1
        result = _on_meta(func, args, kwargs) if weightless else func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        for storage in (tensor.untyped_storage() for tensor in made):
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known:  # counted for as long as it lives
                self._live += size
                self._known[key] = weakref.finalize(storage, self._release, key, size)
        if made and not func.is_view:
            operation = _operation(func, args, kwargs, result, given, made)
            copied = given[0].nbytes if operation.kind == "conv" else 0  # its input is laid out anew while it runs
            self.log.append((operation, self._live + copied))
        return result

    def _release(self, key: int, size: int) -> None:
        self._live -= size
        del self._known[key]


def _operation(
    func, args: tuple, kwargs: dict, result: object, given: list[torch.Tensor], made: list[torch.Tensor]
) -> Operation:
    """What an operation costs, from the tensors that went in and came out."""
    name = func._overloadpacket.__name__
    touched = made * 2 if name.startswith(_LOOK_UP) else given + made
    formula = flop_registry.get(func._overloadpacket)
    flops = int(formula(*args, **kwargs, out_val=result)) if formula else 0
    kind = next((kind for part, kind in KINDS.items() if part in name), "other") if flops else "other"
    match kind:  # what its speed goes by
        case "matmul":
            rows = min(tensor.shape[-2] for tensor in given if tensor.dim() >= 2)
        case "attention":
            rows = given[0].shape[-2]
        case "conv":
            rows = made[0].numel() // made[0].shape[1]
        case _:
            rows = 0
    dtype = next((tensor.dtype for tensor in made if tensor.dtype.is_floating_point), torch.float32)
    return Operation(kind, dtype, flops, sum(tensor.nbytes for tensor in touched), rows)


class Weightless(torch.Tensor):
    """A tensor with a shape and no values, which says that it is on the CPU."""

    @staticmethod
    def __new__(cls, meta: torch.Tensor) -> "Weightless":
        return torch.Tensor._make_subclass(
            cls, meta, meta.requires_grad, dispatch_device=True, device_for_backend_keys=_CPU
        )

    def __init__(self, meta: torch.Tensor) -> None:
        self.meta = meta

    def numpy(self) -> np.ndarray:
        """Values of its shape that are not all the same, so that they are taken for a picture, a film, a sound."""
        return np.eye(1, self.numel(), dtype=np.float32).reshape(self.shape)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _CPU if func is torch.ops.prim.device.default else _on_meta(func, args, kwargs or {})


def weightless(model: torch.nn.Module) -> torch.nn.Module:
    """The model, built on the meta device, with parameters that computing can be tried on; tied ones stay tied."""
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None and id(old) not in made:
                values = Weightless(torch.empty(old.shape, dtype=old.dtype, device="meta"))
                made[id(old)] = torch.nn.Parameter(values, requires_grad=old.requires_grad)
            module._parameters[name] = made.get(id(old))
    return model


def _on_meta(func, args: tuple, kwargs: dict) -> object:
    """What a function gives on the meta device, where a mask that picks values first becomes their places."""
    if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
        places: list[torch.Tensor | None] = []
        for index in args[1]:
            is_mask = index is not None and index.dtype is torch.bool and not isinstance(index, Weightless)
            places += index.nonzero(as_tuple=True) if is_mask else [index]
        args = (args[0], places, *args[2:])
    key = None
    if not func.is_view and not func._schema.is_mutable:
        key = (func, tuple(kwargs), _form((*args, *kwargs.values())))
        if key in _SEEN:
            made = [Weightless(torch.empty_strided(*form, dtype=dtype, device="meta")) for *form, dtype in _SEEN[key]]
            return made[0] if len(made) == 1 else tuple(made)
    there: dict[int, torch.Tensor] = {}
    args, kwargs = _lowered(args, there), {name: _lowered(value, there) for name, value in kwargs.items()}
    if "device" in kwargs:
        kwargs["device"] = torch.device("meta")
    result = func(*args, **kwargs)
    if isinstance(own := there.get(id(result)), Weightless):  # changed in its place
        return own
    made = result if isinstance(result, tuple) and len(result) > 1 else (result,)
    if key is not None and all(isinstance(one, torch.Tensor) for one in made):
        before, after = ({one.untyped_storage()._cdata for one in some} for some in (there.values(), made))
        if len(after) == len(made) and not before & after:
            _SEEN[key] = [(one.shape, one.stride(), one.dtype) for one in made]
    return tree_map(lambda leaf: Weightless(leaf) if isinstance(leaf, torch.Tensor) else leaf, result)


def _form(value: object) -> object:
    """What of an argument decides the form of a result."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_form, value))
    return type(value), value


def _lowered(value: object, there: dict[int, torch.Tensor]) -> object:
    """An argument with its tensors on the meta device; `there` gets for each of them what it stands for."""
    if isinstance(value, list | tuple):
        return [_lowered(one, there) for one in value]
    if not isinstance(value, torch.Tensor):
        return value
    meta = value.meta if isinstance(value, Weightless) else value.to("meta")
    there[id(meta)] = value
    return meta
