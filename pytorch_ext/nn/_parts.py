"""What an encoder is made of, to see in each call whether it still is."""

import operator

from torch import Tensor, nn

from . import _bypass as bypass

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class _Entries:
    """What dictionaries held when this was made; of ``hidden`` names, that they were there or not."""

    def __init__(self, dictionaries: list[dict], hidden: str | None = None):
        self._dictionaries = dictionaries
        self._sizes = list(map(len, dictionaries))
        found = [(d, name) for d in dictionaries for name in d if not (hidden and name.startswith(hidden))]
        self._owners, self._names = [d for d, _ in found], [name for _, name in found]
        self.values = list(map(operator.getitem, self._owners, self._names))

    def unchanged(self) -> bool:
        try:
            same = all(map(operator.is_, self.values, map(operator.getitem, self._owners, self._names)))
        except KeyError:
            return False
        return same and list(map(len, self._dictionaries)) == self._sizes


class Parts:
    """The modules, weights, hooks and modes below an encoder, as they were when this was made.

    A graph has taken weights by their addresses and the way through the modules as it was. All of it is compared in
    each call, a thousand things and more for BERT-base: so by functions that loop in C. The encoder itself is not kept
    alive, nor anything looked at in what an attribute refers to.

    Attributes:
        hindrance: why no graph can be made of them; None if one can.
    """

    def __init__(self, encoder: nn.Module):
        self._states = [vars(m) for m in encoder.modules()]
        self._modules = _Entries([state["_modules"] for state in self._states])
        self._parameters = _Entries([state["_parameters"] for state in self._states])
        self._types = list(map(type, self._modules.values))
        self._tensors = [w for w in self._parameters.values if w is not None]
        hooks = [state[kind] for state in self._states[1:] for kind in _HOOKS]
        self._silent, self._hooks = [h for h in hooks if not h], [h for h in hooks if h]
        self._ids = list(map(list, self._hooks))
        # Modes and rates, and a `forward` of an instance's own.
        self._attributes = _Entries(self._states, hidden="_")
        self.hindrance = self._hindrance(encoder)
        self._addresses = self._places()

    def unchanged(self) -> bool:
        return (
            self._modules.unchanged()
            and list(map(type, self._modules.values)) == self._types
            and self._parameters.unchanged()
            and self._places() == self._addresses
            and not any(self._silent)
            and list(map(list, self._hooks)) == self._ids
            and self._attributes.unchanged()
        )

    def need_grad(self) -> bool:
        return any(map(operator.attrgetter("requires_grad"), self._tensors))

    def _places(self) -> list[int]:
        # What is no ordinary tensor may have none; there are no graphs then.
        return [] if self.hindrance else list(map(Tensor.data_ptr, self._tensors))

    def _hindrance(self, encoder: nn.Module) -> str | None:
        if any(state["training"] for state in self._states):
            return "it is in training mode"
        for weight in self._tensors:
            if type(weight) not in (Tensor, nn.Parameter):
                return f"a weight is a {type(weight).__name__}"
        for path, module in encoder.named_modules():
            if module is not encoder and bypass.hooked(module):
                return f"there is a hook on its {path}"
        return None
