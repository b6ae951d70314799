"""fuse(model) runs the MLPs of an existing model on fused kernels, in place; unfuse(model) undoes it.

`fuse` replaces every `nn.Sequential`, and every module of a class in the table `PATTERNS`. A replaced module stays the
same object, with its parameters, children, hooks and state_dict keys. Only its class changes, to a subclass of the same
name.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .engine import settings
from .engine.originals import why_method_changed
from .engine.recognize import find, import_path
from .engine.runs import find_runs, is_linear, module_name, why_called, why_unfused
from .engine.settings import has_hooks
from .kernels.activations import IDENTITY
from .module import FUSED_ATTRIBUTES, FusedLinear, FusedMLP, FusedSequence, WithBackend, plain_twin

__all__ = ["PATTERNS", "FuseReport", "Pattern", "fuse", "register_pattern", "unfuse"]


@dataclass(frozen=True)
class Pattern:
    """The computation of one method of a known class: y = finish(module, (link_n ∘ … ∘ link_1)(x), x).

    Attributes:
        target: the class's full name, such as "timm.layers.mlp.Mlp". Subclasses that inherit the method are included.
        chain: the links, in order: the attribute paths of the modules, or functions of one tensor, that the method
            calls.
        method: the name of the method, which takes one tensor and nothing else.
        within: the path and the full class name of each module that contains links. Its own forward is not called.
        finish: the rest of the method: a function of the module, the output of the last link, and the input.
        note: a sentence for the report.
    """

    target: str
    chain: tuple[str, ...]
    method: str = "forward"
    within: Mapping[str, str] = field(default_factory=dict)
    finish: Callable[[Any, Tensor, Tensor], Tensor] | None = None
    note: str = ""


PATTERNS: dict[str, Pattern] = {}


def register_pattern(
    target: str | type[nn.Module],
    chain: Sequence[str],
    *,
    method: str = "forward",
    within: Mapping[str, str | type[nn.Module]] | None = None,
    finish: Callable[[Any, Tensor, Tensor], Tensor] | None = None,
    note: str = "",
) -> Pattern:
    """Add a pattern to `PATTERNS`, the table of classes that `fuse` replaces. See `Pattern` for the arguments.

    A class can be given by its full name, so that its library need not be imported.

    Raises:
        ValueError: the class has a pattern already, the chain is empty, or the class has no such method.
        TypeError: an argument has the wrong type.
    """
    path = _path(target, "target")
    if path in PATTERNS:
        raise ValueError(f"target {path} has a pattern already")
    if isinstance(chain, str) or not isinstance(chain, Iterable) or not all(isinstance(name, str) for name in chain):
        raise TypeError(
            f'chain is {chain!r}; it needs to be a list of attribute names, in order, such as ["fc1", "act", "fc2"]'
        )
    if not chain:
        raise ValueError("chain is empty; it needs the attribute names of the modules that the method calls, in order")
    if not isinstance(method, str):
        raise TypeError(f"method is {method!r}; it needs to be a method's name")
    if isinstance(target, type) and not callable(getattr(target, method, None)):
        raise ValueError(f"method is {method!r}, but {target.__name__} has no such method")
    if finish is not None and not callable(finish):
        raise TypeError(f"finish is {finish!r}; it needs to be a function (module, output, input) -> output")
    inner = {name: _path(kind, f"within[{name!r}]") for name, kind in (within or {}).items()}
    PATTERNS[path] = Pattern(path, tuple(chain), method, inner, finish, note)
    return PATTERNS[path]


def _path(kind: object, argument: str) -> str:
    if isinstance(kind, type) and issubclass(kind, nn.Module):
        return import_path(kind)
    if not isinstance(kind, str) or "." not in kind:
        raise TypeError(f'{argument} is {kind!r}; it needs to be an nn.Module class or its full name, "package.Class"')
    return kind


def _bert_finish(layer: Any, output: Tensor, input: Tensor) -> Tensor:
    normalized: Tensor = layer.output.LayerNorm(output + input)
    return normalized


register_pattern(
    nn.TransformerEncoderLayer,
    ["linear1", "activation", "dropout", "linear2", "dropout2"],
    method="_ff_block",
    note="in inference torch may still run the whole layer as one operator; "
    "torch.backends.mha.set_fastpath_enabled(False) prevents that",
)
register_pattern(
    nn.TransformerDecoderLayer,
    ["linear1", "activation", "dropout", "linear2", "dropout3"],
    method="_ff_block",
)
register_pattern("timm.layers.mlp.Mlp", ["fc1", "act", "drop1", "norm", "fc2", "drop2"])
register_pattern(
    "transformers.models.bert.modeling_bert.BertLayer",
    ["intermediate.dense", "intermediate.intermediate_act_fn", "output.dense", "output.dropout"],
    method="feed_forward_chunk",
    within={
        "intermediate": "transformers.models.bert.modeling_bert.BertIntermediate",
        "output": "transformers.models.bert.modeling_bert.BertOutput",
    },
    finish=_bert_finish,
)
register_pattern("transformers.models.gpt2.modeling_gpt2.GPT2MLP", ["c_fc", "act", "c_proj", "dropout"])
register_pattern("transformers.models.vit.modeling_vit.ViTMLP", ["fc1", "activation_fn", "fc2"])
# For transformers before 5.9: there, ViTLayer's forward calls ViTOutput, whose Linear this pattern cannot include.
register_pattern("transformers.models.vit.modeling_vit.ViTIntermediate", ["dense", "intermediate_act_fn"])

# Names of children that show a gated MLP: its activation is multiplied by the output of another Linear.
GATED = ({"gate_proj", "up_proj"}, {"fc1_g", "fc1_x"})
# Classes of gated MLPs whose children do not show it.
GATED_CLASSES = ("timm.layers.mlp.GluMlp",)


@dataclass(frozen=True)
class Entry:
    """A module in a report: its name in the model, the name of its class, and what was fused or why nothing was."""

    name: str
    kind: str
    text: str


@dataclass(frozen=True)
class FuseReport:
    """The modules that `fuse` replaced, and the ones that it did not, with the reasons. `print` it to read it."""

    replaced: tuple[Entry, ...]
    left: tuple[Entry, ...]

    def __str__(self) -> str:
        lines = []
        for title, entries in (("replaced", self.replaced), ("left as they are", self.left)):
            lines.append(f"{title}: {len(entries) or 'nothing'}")
            alike: dict[tuple[str, str], list[str]] = {}
            for entry in entries:
                alike.setdefault((entry.kind, entry.text), []).append(entry.name or "the model itself")
            for (kind, text), names in alike.items():
                shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                lines.append(f"  {shown} ({kind}): {text}")
        return "\n".join(lines)


def fuse(
    model: nn.Module,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    *,
    backend: settings.Backend = "auto",
    recompute: bool | None = None,
) -> FuseReport:
    """Run the MLPs inside a model on fused kernels, in place; parameters, state_dict keys and hooks stay.

    `fuse` replaces, at any depth, every `nn.Sequential` in which a Linear is followed by an activation, and every
    module of a class in `PATTERNS`. A subclass of `nn.Sequential` counts if it inherits forward, as
    `torchvision.ops.MLP` does. A replaced module is the same object. It is still an instance of its old class and
    prints as before, and it gains `FusedMLP`'s `explain`, `warmup`, `backend` and `recompute`.

    A child is called as a module, and not fused, while it has hooks, a parametrization, or a forward of its own (LoRA,
    quantization). A module with shared or quantized weights is not replaced. Call `fuse` before `fully_shard` and
    `torch.compile`.

    Args:
        model: any module.
        filter_fn: a function (module, name) -> bool, called with each module that would be replaced and its name in the
            model ("" for the model itself); the arguments have the order of torchao's. If it returns False, the module
            is not replaced; modules inside it still may be.
        backend, recompute: as in `FusedMLP`, for every replaced module.

    Returns:
        The replaced modules, and the others with the reasons.

    Raises:
        TypeError: `model` is not a module, `filter_fn` is not a function or returns something other than True or
            False, or `recompute` is neither True, False nor None.
        ValueError: the backend is unknown.
        The model is then unchanged.
    """
    _check_model(model)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn is {filter_fn!r}; it needs to be a function (module, name) -> bool, or None")
    backend = settings.check_backend(backend)
    recompute = settings.check_recompute(recompute)

    shared = _shared_parameters(model)
    chosen: list[Any] = []
    replaced: list[Entry] = []
    left: list[Entry] = []
    links: set[int] = set()  # ids of the children of modules that were replaced, or that are in `left` already
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, FusedSequence):
            left.append(Entry(name, kind, "it is fused already"))
            links.update(map(id, (module, *module._ordered_children())))
            continue
        replacement = _find_replacement(type(module))
        if replacement is None or (replacement.pattern is None and not any(map(is_linear, module.children()))):
            continue
        reason = replacement.why_not(module)
        if reason is None:
            chain = replacement.chain(module)
            fused, apart = _what_runs(chain)
            reason = _why_left_alone(chain, shared, name)
            if reason is None and not fused:
                reason = "; ".join(["no Linear in it is followed by an activation with a kernel", *apart])
            links.update(map(id, chain.values()))
        else:
            links.update(id(child) for child in module.children() if is_linear(child))
        if reason is None and filter_fn is not None:
            answer = filter_fn(module, name)
            if not isinstance(answer, bool):
                raise TypeError(f"filter_fn returned {answer!r} for {name!r}; it needs to return True or False")
            reason = None if answer else "filter_fn returned False"
        if reason is not None:
            left.append(Entry(name, kind, reason))
            continue
        note = replacement.pattern.note if replacement.pattern is not None else ""
        replaced.append(Entry(name, kind, "; ".join([*fused, *apart, *([note] if note else [])])))
        chosen.append(module)
    left += _other_linears(model, links)

    classes: list[Any] = list(map(type, chosen))
    for module, fused_class in zip(chosen, list(map(_fused_class, classes))):
        module.__class__ = fused_class
        module.__dict__.update(_backend=backend, _recompute=recompute)
    return FuseReport(tuple(replaced), tuple(left))


def unfuse(model: nn.Module) -> tuple[str, ...]:
    """Undo `fuse`: give every replaced module its old class again.

    Call it before `torch.save(model, file)`, and the file can be loaded without mlp_fused.

    Returns:
        The names of the modules, in the model's order; empty if `fuse` had replaced none.

    Raises:
        TypeError: `model` is not a module.
        RuntimeError: the class of a replaced module was changed again after `fuse`. The model is then unchanged.
    """
    _check_model(model)
    fused: list[tuple[str, Any]] = [entry for entry in model.named_modules() if isinstance(entry[1], _Fused)]
    for name, module in fused:
        if "_unfused" not in vars(type(module)):
            raise RuntimeError(
                f"the class of {name or 'the model'} was changed to {type(module).__name__} after fuse, by fully_shard "
                "for example; call unfuse before that"
            )
    for _, module in fused:
        module.__class__ = module._unfused
        for attribute in FUSED_ATTRIBUTES:
            module.__dict__.pop(attribute, None)
    return tuple(name for name, _ in fused)


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; it needs to be an nn.Module")


@dataclass(frozen=True)
class _Replacement:
    """The way to replace a class: by its pattern or, without one, as nn.Sequential. `known` is the class to replace."""

    pattern: Pattern | None
    known: type[nn.Module]

    def why_not(self, module: nn.Module) -> str | None:
        """The reason why this module cannot be replaced; None if it can."""
        kind = type(module)
        method = "forward" if self.pattern is None else self.pattern.method
        for name in dict.fromkeys(("forward", "__iter__" if self.pattern is None else method)):
            if getattr(kind, name, None) is not getattr(self.known, name, None):
                return f"{kind.__name__} has a {name} of its own, in which an activation cannot be seen; {HINT}"
        if hasattr(kind, method) and (why := why_method_changed(kind, method)) is not None:
            return why
        if method in module.__dict__:
            return f"a {method} is patched onto it"
        for reserved in RESERVED:
            if hasattr(module, reserved):
                return f"it has an attribute {reserved!r} of its own"
        if self.pattern is None:
            return None
        library = self.known.__module__.split(".")[0]
        drifted = f"the pattern is for another version of {library}"
        if not hasattr(kind, method):
            return f"{kind.__name__} has no {method}; {drifted}"
        try:
            self.chain(module)
            within = {name: _follow(module, name.split(".")) for name in self.pattern.within}
        except AttributeError as error:
            return f"{error}; {drifted}"
        for name, target in self.pattern.within.items():
            inner = within[name]
            if import_path(type(inner)) != target:
                return f"its {name} is {module_name(inner)}, not {target.rsplit('.', 1)[1]}"
            if has_hooks(inner):
                return f"its {name} has hooks, or a forward patched onto it"
        if method == "forward" and self.pattern.finish is None:
            tops = {path.split(".")[0] for path in self.pattern.chain}
            for name, child in module.named_children():
                if name not in tops:
                    return f"it has a {name} ({module_name(child)}), which the pattern does not have; {drifted}"
        return None

    def chain(self, module: nn.Module) -> dict[str, Any]:
        """The children that are called, by path, in order."""
        if self.pattern is None:
            return dict(module._modules)
        return {path: _follow(module, path.split(".")) for path in self.pattern.chain}


HINT = "if one follows, replace the Linear by FusedLinear(…, activation=…)"

# Attributes that a replaced module gains. A module that has one of them already cannot be replaced.
RESERVED = tuple(name for kind in (FusedSequence, WithBackend) for name in vars(kind) if not name.startswith("__"))


def _find_replacement(kind: type[nn.Module]) -> _Replacement | None:
    """The way to replace a class; None if there is none."""
    for known in kind.__mro__:
        if pattern := PATTERNS.get(import_path(known)):
            return _Replacement(pattern, known)
    return _Replacement(None, nn.Sequential) if issubclass(kind, nn.Sequential) else None


def _follow(module: Any, path: Iterable[str]) -> Any:
    for name in path:
        child = module._modules.get(name)  # nn.Module's own look-up takes six times as long
        module = getattr(module, name) if child is None else child
    return module


def _what_runs(chain: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(fused, apart): a text for each fused run of layers, and one for each child that is called as a module."""
    # Dropout counts as an identity, so that the result does not depend on the mode (train or eval) of the model.
    steady = {
        name: nn.Identity() if type(link) is nn.Dropout and not has_hooks(link) else link
        for name, link in chain.items()
    }
    names = iter(steady)
    fused, apart = [], []
    for run in find_runs(steady.values()):
        named = list(zip(run.children, names))
        if run.linears:
            links = (name for link, name in named if is_linear(link))
            layers = [
                path + ("" if activation is IDENTITY else f" + {activation}")
                for path, (_, activation) in zip(links, run.linears)
            ]
            if any(activation is not IDENTITY for _, activation in run.linears):
                fused.append(", ".join(layers))
        else:
            ((link, name),) = named
            if type(link) is not nn.Identity or has_hooks(link):
                apart.append(f"{name} is called as a module: {_why_called(link, run.reason)}")
    return fused, apart


def _why_called(link: Any, reason: str | None) -> str:
    """The reason why a child is called as a module."""
    if has_hooks(link):
        return "it has hooks, or a forward patched onto it"
    if is_linear(link):
        return reason or ""
    if (activation := find(link)) is not None:
        return why_called(link, activation=activation) or "it does not follow a Linear that runs in a kernel"
    name = (
        import_path(type(link)).removeprefix("torch.nn.modules.") if isinstance(link, nn.Module) else module_name(link)
    )
    return f"{name} has no kernel"


def _shared_parameters(model: nn.Module) -> dict[int, list[str]]:
    """The names of each parameter that has more than one, by the parameter's id."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {key: several for key, several in names.items() if len(several) > 1}


def _why_left_alone(chain: Mapping[str, Any], shared: Mapping[int, list[str]], name: str) -> str | None:
    """The reason why the parameters of a chain keep its module from being replaced; None if they do not."""
    for path, link in chain.items():
        if why_unfused(link) is not None:
            continue
        if isinstance(link, FusedLinear):
            path, link = f"{path}.linear", link.linear
        for key, parameter in link._parameters.items():
            if parameter is None:
                continue
            full = ".".join(filter(None, (name, path, key)))
            others = [other for other in shared.get(id(parameter), ()) if other != full]
            if others:
                return f"its {path}.{key} is shared with {others[0]}"
            if type(parameter) not in (Tensor, nn.Parameter):
                return f"its {path}.{key} is {type(parameter).__name__}, not a plain tensor (quantized or sharded)"
            if not parameter.is_floating_point():
                return f"its {path}.{key} is {parameter.dtype}"
    return None


def _other_linears(model: nn.Module, links: set[int]) -> list[Entry]:
    """An entry for each Linear that is in no chain, with the module that calls it."""
    entries: dict[int, Entry] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        if not is_linear(module) or id(module) in links or id(module) in entries:
            continue
        kind = module_name(module)
        if not name:
            entries[id(module)] = Entry(name, kind, f"an activation after it cannot be seen; {HINT}")
            continue
        caller = name.rpartition(".")[0]
        while caller and isinstance(modules[caller], nn.ModuleList | nn.ModuleDict):
            caller = caller.rpartition(".")[0]
        by = modules[caller]
        if _is_gated(by):
            entries[id(by)] = Entry(
                caller, module_name(by), "it is gated: its activation is multiplied by another product"
            )
            continue
        called = f"called in {module_name(by)}'s own forward, where an activation cannot be seen; {HINT}"
        entries[id(module)] = Entry(name, kind, why_unfused(module) or called)
    return list(entries.values())


def _is_gated(module: nn.Module) -> bool:
    return import_path(type(module)) in GATED_CLASSES or any(names <= module._modules.keys() for names in GATED)


NEW: Any = vars(copyreg)["__newobj__"]  # pickle's function that makes an object without calling its constructor


class _Fused:
    """Base of the classes that `fuse` gives to modules. Instances are pickled under their old class, `_unfused`."""

    _unfused: Any

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(2, protocol))
        function, arguments, *rest = reduced
        if function is NEW:
            function, arguments = _remake, (self._unfused, *arguments[1:])
        if rest and isinstance(rest[0], dict):
            rest[0] = {name: value for name, value in rest[0].items() if name != "_segments"}
        return function, arguments, *rest

    def __prepare_scriptable__(self) -> nn.Module:
        """The module as it was before `fuse`, for torch.jit.script."""
        twin: nn.Module = plain_twin(self, self._unfused)
        return twin


def _remake(kind: Any, *arguments: Any) -> nn.Module:
    """Make a replaced module without its state, for pickle and copy."""
    if _find_replacement(kind) is None:
        raise RuntimeError(
            f"{import_path(kind)} was fused by a pattern that is not registered here; "
            "call register_pattern before loading"
        )
    module: nn.Module = NEW(_fused_class(kind), *arguments)
    return module


def _fused_class(kind: Any) -> Any:
    """The class that replaces `kind`."""
    replacement = _find_replacement(kind)
    assert replacement is not None
    return _derive(kind, "" if replacement.pattern is None else replacement.pattern.target)


@functools.cache
def _derive(kind: Any, target: str) -> Any:
    """The subclass of `kind` that `fuse` uses: a FusedMLP, or for a pattern's target a FusedSequence of its chain."""
    members: dict[str, Any] = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "_unfused": kind,
    }
    bases: tuple[type, ...]
    if target:
        pattern = PATTERNS[target]
        bases = (_Fused, kind, FusedSequence)
        members.update(_methods(pattern, kind))
    else:
        bases = (_Fused, FusedMLP) if kind is nn.Sequential else (_Fused, kind, FusedMLP)
        members["__init__"] = _init_like(kind)
    return type(kind)(kind.__name__, bases, members)


def _init_like(kind: Any) -> Callable[..., None]:
    """An `__init__` with the arguments of `kind`, for code that calls `type(model)(…)`; FusedMLP's has others."""

    @functools.wraps(kind.__init__)
    def init(self: Any, *arguments: Any, **keywords: Any) -> None:
        self.__dict__.update(kind(*arguments, **keywords).__dict__)

    return init


def _methods(pattern: Pattern, kind: Any) -> dict[str, Any]:
    """The members of a subclass of `kind` that come from its pattern: the chain, and the method that runs it."""
    original: Callable[..., Tensor] = getattr(kind, pattern.method)
    steps = tuple(tuple(path.split(".")) for path in pattern.chain)
    within = tuple((tuple(path.split(".")), target) for path, target in pattern.within.items())
    finish = pattern.finish
    parameter = list(inspect.signature(original).parameters)[1]

    def ordered_children(self: Any) -> tuple[Any, ...]:
        return tuple([_follow(self, path) for path in steps])

    @functools.wraps(original)
    def method(self: Any, *arguments: Any, **keywords: Any) -> Tensor:
        current: Callable[..., Tensor] = getattr(kind, pattern.method)
        if current is not original:  # the class's method was replaced after `fuse`
            return current(self, *arguments, **keywords)
        if len(arguments) == 1 and not keywords:
            (input,) = arguments
        elif not arguments and keywords.keys() == {parameter}:
            input = keywords[parameter]
        else:
            return original(self, *arguments, **keywords)
        for path, target in within:
            inner = _follow(self, path)
            if has_hooks(inner) or import_path(type(inner)) != target:
                return original(self, input)
        output: Tensor = self._forward(input)
        return output if finish is None else finish(self, output, input)

    return {"_ordered_children": ordered_children, "_ordered_names": lambda self: pattern.chain, pattern.method: method}
