"""Counterparts: map the tensors of an injected network to those of another network that has SE blocks by design.

Takes an injected model and the other network, gives which state-dict key becomes which, or the sentence that says in
what the two differ. Compares names and shapes alone; changes nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from se_inject.block import count_hidden
from se_inject.errors import ExportError
from se_inject.rewrite import blocks

_NUM_SHOWN = 3
_RATIOS = (16, 8, 4, 32, 2, 1, 3, 6, 12, 24, 64)
_DIVISORS = (8, 1, 4, 16, 32)


@dataclass(frozen=True)
class GateLayers:
    """The two layers of an SE module, as a state dict shows them.

    Attributes:
        path: Path of the SE module.
        names: Names of its two layers, W1 and W2.
        channels: C, the channels that it gates.
        hidden: Outputs of W1.
        bias: Whether both layers have biases.
    """

    path: str
    names: tuple[str, str]
    channels: int
    hidden: int
    bias: bool

    @property
    def keys(self) -> list[str]:
        """Keys in the state dict: weights and biases of W1 and W2."""
        return [f"{self.path}.{name}.{kind}" for name in self.names for kind in ("weight", "bias")[: 1 + self.bias]]


def map_keys(model: nn.Module, target: nn.Module, name: str) -> dict[str, str]:
    """Map the state-dict keys of an injected network to those of another one.

    Raises:
        ExportError: There is no such map; the message says what differs.
    """
    own, other = model.state_dict(), target.state_dict()
    ours = [read_gate_layers(path, own) for path in blocks(model)]
    theirs = find_gate_layers(other)
    if not theirs:
        raise ExportError(f"{name} has no squeeze-and-excitation block of two layers; give one of timm's SE networks")
    keys = _map_skeleton(drop_gates(own, ours), drop_gates(other, theirs), type(model).__name__, name)
    _check_gates(ours, theirs, type(model).__name__, name)
    for gate, their in zip(ours, _order_alike(ours, theirs), strict=True):
        keys |= dict(zip(gate.keys, their.keys, strict=True))
    return keys


def find_gate_layers(state: Mapping[str, Tensor]) -> list[GateLayers]:
    """Find the SE modules in a state dict: those whose tensors are a layer C -> C/r, one back, and nothing else.

    Example:
        >>> import timm
        >>> find_gate_layers(timm.create_model("seresnet18").state_dict())[0]
        GateLayers(path='layer1.0.se', names=('fc1', 'fc2'), channels=64, hidden=8, bias=True)
    """
    modules: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    prefixes: set[str] = set()
    for key in state:
        head, _, kind = key.rpartition(".")
        path, _, layer = head.rpartition(".")
        modules[path][layer].add(kind)
        prefixes.update(path.rsplit(".", i)[0] for i in range(1, path.count(".") + 1))
    found = []
    for path, layers in modules.items():
        kinds = list(layers.values())
        if not path or path in prefixes or len(layers) != 2 or kinds[0] != kinds[1] or "weight" not in kinds[0]:
            continue
        first, second = (state[f"{path}.{layer}.weight"] for layer in layers)
        is_matrix = first.ndim in (2, 4) and set(first.shape[2:]) <= {1} and first.shape[1] > first.shape[0]
        if is_matrix and second.shape == first.transpose(0, 1).shape and kinds[0] <= {"weight", "bias"}:
            found.append(read_gate_layers(path, state, tuple(layers)))
    return found


def read_gate_layers(path: str, state: Mapping[str, Tensor], names: tuple[str, ...] = ("fc1", "fc2")) -> GateLayers:
    """Read the two layers of the SE module at a path."""
    first, second = names
    hidden, channels = state[f"{path}.{first}.weight"].shape[:2]
    return GateLayers(path, (first, second), channels, hidden, bias=f"{path}.{first}.bias" in state)


def propose_options(gates: Sequence[GateLayers]) -> dict[str, Any]:
    """Find the options of `inject` that give blocks of these sizes.

    Args:
        gates: Blocks, with the paths of the sites if no single ratio gives them all.

    Example:
        >>> propose_options([GateLayers("layer1.0.se", ("fc1", "fc2"), 64, 8, True)])
        {'r': 16, 'divisor': 8, 'bias': True}
    """
    sizes = {(gate.channels, gate.hidden) for gate in gates}
    bias = all(gate.bias for gate in gates)
    for divisor in _DIVISORS:
        for r in _RATIOS:
            if all(count_hidden(channels, r, divisor=divisor) == hidden for channels, hidden in sizes):
                return {"r": r, "divisor": divisor, "bias": bias}
    ratios = {gate.path.rpartition(".")[0]: gate.channels / gate.hidden for gate in gates}
    return {"r": ratios, "divisor": 1, "bias": bias}


def drop_gates(state: Mapping[str, Tensor], gates: Sequence[GateLayers]) -> dict[str, Tensor]:
    """Return a state dict without the tensors of SE modules: the skeleton of the network."""
    gated = {key for gate in gates for key in gate.keys}
    return {key: value for key, value in state.items() if key not in gated}


def _map_skeleton(own: Mapping[str, Tensor], other: Mapping[str, Tensor], model: str, name: str) -> dict[str, str]:
    """Map keys by name, or by order where the names differ and kinds and shapes agree one by one."""
    missing = [key for key in own if key not in other]
    unexpected = [key for key in other if key not in own]
    reshaped = [f"{key} {_show(own[key])} against {_show(other[key])}" for key in own if _differ(key, own, other)]
    if not (missing or unexpected or reshaped):
        return {key: key for key in own}
    forms = [[(key.rpartition(".")[2], value.shape) for key, value in state.items()] for state in (own, other)]
    if forms[0] == forms[1]:
        return dict(zip(own, other, strict=True))
    parts = ((f"only in {model}", missing), (f"only in {name}", unexpected), ("of another shape", reshaped))
    differences = "; ".join(f"{len(keys)} {what} ({_shorten(keys)})" for what, keys in parts if keys)
    raise ExportError(f"{name} is not {model} with blocks added, tensors differ: {differences}")


def _check_gates(ours: Sequence[GateLayers], theirs: Sequence[GateLayers], model: str, name: str) -> None:
    if len(ours) != len(theirs):
        raise ExportError(
            f"{model} was injected with {len(ours)} blocks, {name} has {len(theirs)}: "
            f"{_shorten(gate.path for gate in theirs)}"
        )
    for our, their in zip(ours, _order_alike(ours, theirs), strict=True):
        if (our.channels, our.hidden, our.bias) != (their.channels, their.hidden, their.bias):
            options = propose_options(theirs)
            advice = "; inject with " + ", ".join(f"{key}={value}" for key, value in options.items())
            if our.channels != their.channels:
                advice = ", which stands elsewhere in its module"
            elif isinstance(options["r"], dict):
                advice = ", which no single r gives"
            raise ExportError(f"the block {our.path} is {_show_gate(our)}, that of {name} {_show_gate(their)}{advice}")


def _order_alike(ours: Sequence[GateLayers], theirs: Sequence[GateLayers]) -> list[GateLayers]:
    """Bring blocks into the order of others: by the path of the owner, or as they come where owners differ."""
    owners = {gate.path.rpartition(".")[0]: gate for gate in theirs}
    ordered = [owners.get(gate.path.rpartition(".")[0]) for gate in ours]
    return [gate for gate in ordered if gate] if len(owners) == len(theirs) and all(ordered) else list(theirs)


def _differ(key: str, own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return key in other and own[key].shape != other[key].shape


def _show(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _show_gate(gate: GateLayers) -> str:
    return f"{gate.channels} -> {gate.hidden} -> {gate.channels} {'with' if gate.bias else 'without'} biases"


def _shorten(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:_NUM_SHOWN]) + (", ..." if len(listed) > _NUM_SHOWN else "")
