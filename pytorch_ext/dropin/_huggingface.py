"""How a Hugging Face model hands its 2-D attention mask down to an encoder.

A model turns the mask into what its attention implementation wants, by the name in its config, before the encoder sees
it. So our implementation is registered under a name of our own (``standins/hf_attention.py``), and the model gets a
copy of its config that says this name: two models may have been built from one config object.
"""

import copy
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import nn

NAME = "pytorch_ext"
_ATTRIBUTE = "_pytorch_ext_config"


def wanted(what: str, config, kwargs: dict) -> bool:
    """Whether a call or the config asks for ``"output_attentions"`` or ``"output_hidden_states"``."""
    asked = kwargs.get(what)
    return bool(getattr(config, what, False) if asked is None else asked)


def config_of(module: nn.Module) -> Any:
    """The config of ``module``, which may lie in one of the modules below it alone."""
    return _holder(module).config


@dataclass
class Adopted:
    """What a module had before it got a config of its own: kept beside the config, in the module.

    Attributes:
        shared: the config that it had.
        fields: of the copy, as it was made; what differs from them was changed since.
    """

    shared: Any
    fields: dict


def adopt_config(model: nn.Module, encoder: nn.Module) -> None:
    """Gives every module of ``model`` that shares the config of ``encoder`` one copy that names our attention."""
    encoder = _holder(encoder)
    done = encoder.__dict__.get(_ATTRIBUTE)
    if done is None and encoder.config._attn_implementation == NAME:
        return
    own = copy.deepcopy(encoder.config) if done is None else encoder.config
    own._attn_implementation = NAME
    done = done or Adopted(encoder.config, copy.deepcopy(vars(own)))
    for module in model.modules():
        if module.__dict__.get("config") is done.shared:
            module.__dict__[_ATTRIBUTE] = done
            module.config = own


def adopters(model: nn.Module) -> set[nn.Module]:
    """The modules of ``model`` that have a config of their own now."""
    return {module for module in model.modules() if _ATTRIBUTE in module.__dict__}


def restore_configs(model: nn.Module, keep: Collection[nn.Module] = ()) -> None:
    """The original config objects again, with what was changed in the copies since; not for the modules to ``keep``."""
    for module in adopters(model).difference(keep):
        done = module.__dict__.pop(_ATTRIBUTE)
        own, absent = module.config, object()
        changed = {name: v for name, v in vars(own).items() if done.fields.get(name, absent) != v}
        vars(done.shared).update(changed)
        module.config = done.shared
        # A module outside ``model`` may still have the copy, and would go on handing the 2-D mask down.
        if own._attn_implementation == NAME:
            own._attn_implementation = done.shared._attn_implementation


def _holder(module: nn.Module) -> nn.Module:
    return next(m for m in module.modules() if "config" in m.__dict__)
