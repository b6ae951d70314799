"""FusedLinear and FusedMLP: an nn.Linear and an nn.Sequential that run as fused kernels on a GPU."""

from __future__ import annotations

import copy
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import memory
from .engine import paths, settings
from .engine.autograd import run_path
from .engine.calls import can_checkpoint, checkpointed, run_kernels
from .engine.layer_path import LayerPath
from .engine.originals import Dropout, Sequential, is_dropout_torchs, why_changed, why_mode
from .engine.paths import find_path
from .engine.recognize import find, name_in_sentences, resolve
from .engine.runs import Decision, LinearWithActivation, Run, Segments, find_runs, linear_weight, why_unfused
from .engine.settings import are_hooked, call_settings, count_function_modes, has_global_hooks, policy_dtype
from .errors import checked_probability, checked_width, checked_widths, first_line
from .explain import Plan, checked_rows, explain
from .functional import check_call
from .kernels.activation import Activation
from .kernels.activations import IDENTITY
from .reference import Layer

__all__ = ["FusedLinear", "FusedMLP", "Pointwise"]


def plain_twin(module: Any, kind: type[nn.Module]) -> Any:
    """A module of class `kind` with the same children, parameters, hooks and attributes."""
    twin: Any = kind.__new__(kind)
    own = {name: value for name, value in module.__dict__.items() if name not in FUSED_ATTRIBUTES}
    twin.__dict__.update(own, _modules=dict(module._modules))
    return twin


FUSED_ATTRIBUTES = ("_backend", "_recompute", "_segments")  # attributes that only fused modules have


class Pointwise(nn.Module):
    """h = a(z) in plain torch: a module for activations that have no class in torch.nn.

    Args:
        activation: a name, an `nn.Module` class or instance, or a function of torch.
        parameters: parameters of the activation, such as `negative_slope=0.2`.

    Shape:
        input of any shape -> the same shape and dtype.

    Raises:
        ValueError, TypeError: as in `FusedLinear`; or the activation does not have such a parameter.
    """

    def __init__(
        self, activation: str | Activation | nn.Module | type[nn.Module] | Callable[..., Tensor], **parameters: float
    ) -> None:
        super().__init__()
        self.activation = resolve(activation).bind(**parameters)

    def forward(self, input: Tensor) -> Tensor:
        return self.activation(input)

    def extra_repr(self) -> str:
        return str(self.activation)

    def __prepare_scriptable__(self) -> nn.Module:
        """The traced module, for torch.jit.script, which cannot compile the table of activations."""
        traced: nn.Module = torch.jit.trace(self, torch.zeros(1, 1))
        return traced


# nn.Sequential's own forward; None if it was replaced before the import. A replacement is called instead of the
# kernels.
SEQUENTIAL_FORWARD = Sequential.forward if why_changed(Sequential, Sequential) is None else None


class WithBackend:
    """A module with the attribute `backend`, the user's choice."""

    _backend: settings.Backend = "auto"

    @property
    def backend(self) -> settings.Backend:
        """ "auto", "triton" or "reference"; may be assigned."""
        return self._backend

    @backend.setter
    def backend(self, backend: settings.Backend) -> None:
        self._backend = settings.check_backend(backend)


class FusedSequence(WithBackend, nn.Module):
    """A sequence of modules. Consecutive Linear, activation and Dropout modules run as fused kernels."""

    _recompute: bool | None = None
    _segments: Segments | None = None  # cached between calls

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module):
            self.__dict__["_segments"] = None  # it would keep a replaced child alive until the next call
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        self.__dict__["_segments"] = None
        super().__delattr__(name)

    def _ordered_children(self) -> tuple[Any, ...]:
        """The children in the order of their calls: modules, and functions of a tensor."""
        return tuple(self._modules.values())

    def _ordered_names(self) -> tuple[str, ...]:
        """The names of these children."""
        return tuple(self._modules)

    @property
    def recompute(self) -> bool | None:
        """True, False, or None for the faster one; may be assigned."""
        return self._recompute

    @recompute.setter
    def recompute(self, recompute: bool | None) -> None:
        self._recompute = settings.check_recompute(recompute)

    def _forward(self, input: object) -> Tensor:
        if Sequential.forward is not SEQUENTIAL_FORWARD and isinstance(self, Sequential):
            replaced: Any = Sequential.forward
            output: Tensor = replaced(self, input)
            return output
        if not isinstance(input, Tensor):  # torch.fx traces with proxies
            return self._forward_as_modules(input)
        if not self._wants_kernels() and input.device.type == "cpu" and not (self._recompute and can_checkpoint(input)):
            return self._forward_as_modules(input)
        if torch.compiler.is_compiling():
            for run in find_runs(self._ordered_children(), drops=False):  # a compiler draws random numbers itself
                input = self._run(run, input)
            return input
        segments = self._segments
        if segments is None or not segments.hold(self):
            segments = self._segments = Segments(self)
            if self._wants_kernels():
                segments.refuse_split(self)
            if input.is_cuda:
                segments.log_reasons()
        try:
            for run in segments.runs:
                input = self._run(run, input)
        except torch.OutOfMemoryError as error:
            if not input.is_nested:
                memory.explain(error, self, input.shape[:-1].numel())
            raise
        return input

    def _run(self, run: Run, input: Tensor) -> Tensor:
        """Call one run, by the path of an earlier call if nothing has changed since, else by a new decision."""
        if run.linears:
            if run.decisions:
                weights, biases = run.parameters()
                now = call_settings(run.decisions[0].kind, self._backend, self._recompute)
                for decision in run.decisions:
                    if decision.holds(input, weights, biases, now):
                        return run_path(input, weights, biases, decision.path)
            if any(run.dropouts) and settings.is_intercepted():
                return run.call(input)  # the registered operators do not draw random numbers
            layers = run.layers()
            dtype = check_call(input, layers)
            if paths.why_reference(input, layers, dtype, self._backend, self._recompute) is None:
                weights, biases = run.parameters()
                if Decision.can_hold(input, weights, biases):
                    path = find_path(input, layers, dtype, self._recompute, self._backend)
                    if not (self._recompute and isinstance(path, LayerPath)):  # those run under torch's checkpoint
                        now = call_settings(input.device.type, self._backend, self._recompute)
                        run.decisions = [Decision(input, weights, biases, now, path), *run.decisions[:1]]
                        return run_path(input, weights, biases, path)
                return run_kernels(input, layers, dtype, self._recompute, self._backend)
        if run.linears and self._recompute and can_checkpoint(input):
            # Dropout draws random numbers in here, so torch has to restore its generator for the second run. While a
            # CUDA graph is captured, torch 2.10 can do that; 2.9 raises an error.
            return checkpointed(run.fixed_call(), input, *run.parameters())
        return run.call(input)

    def __getstate__(self) -> dict[str, Any]:
        """The attributes without the cache between calls, because kernels cannot be pickled."""
        return {**self.__dict__, "_segments": None}

    def _wants_kernels(self) -> bool:
        """True if the user asked for kernels even on a CPU, where the interpreter runs them."""
        return (settings.DEFAULT_BACKEND if self._backend == "auto" else self._backend) == "triton"

    def _forward_as_modules(self, input: Any) -> Tensor:
        """Call the modules themselves, on a CPU and under torch.compile.

        The input is checked only after an error, because nothing was launched by then.
        """
        output: Tensor = input
        # True if Dropout with p = 0 may be skipped; None: not checked yet. It is never skipped while a graph is traced.
        idle: bool | None = None if isinstance(input, Tensor) else False
        try:
            for child in self._ordered_children():
                if type(child) is Dropout and child.p == 0 and not are_hooked((child.__dict__,)):
                    if idle is None:
                        watched = has_global_hooks() or (count_function_modes() and why_mode())
                        idle = not watched and is_dropout_torchs()
                    if idle:
                        continue  # it would do nothing, in the time of two calls
                output = child(output)
        except (RuntimeError, TypeError):
            first = self._ordered_children()[0]
            if why_unfused(first) is None:
                _raise_if_wrong(input, first)
            raise
        return output

    def warmup(self, *batch_sizes: int, training: bool = True) -> float:
        """Compile the kernels for batches of these sizes ahead, so that the first batch does not wait for it.

        Every run of layers runs on zeros, once without gradients, and with `training` once more forward and backward.
        The dtype is that of a call, so call `warmup` under autocast if the model runs under it. The model does not
        change: norms are not called, no `.grad` is written, and torch's generators are restored. Dropout is active in
        the passes that record gradients. Batches of about the same size compile nothing more. A batch of another order
        of magnitude may select other tiles.

        Returns:
            The seconds that it took.

        Raises:
            ValueError: no batch size, or one below 1 or above 2^40.
            RuntimeError: backend="triton" cannot run, as in a call.
        """
        if not batch_sizes:
            raise ValueError("batch_sizes is empty; it needs one number of rows or more")
        sizes = [checked_rows(batch_size, least=1) for batch_size in batch_sizes]
        begun = time.perf_counter()
        devices = {parameter.device for parameter in self.parameters() if parameter.is_cuda}
        with torch.inference_mode(False), torch.random.fork_rng([device.index for device in devices]):
            for differentiable in (False, True)[: 1 + training]:
                below = False  # True if anything before the run needs gradients
                for run in find_runs(self._ordered_children(), differentiable):
                    trainable = below or any(
                        parameter.requires_grad
                        for child in run.children
                        if isinstance(child, nn.Module)
                        for parameter in child.parameters()
                    )
                    if run.linears:
                        layers = [
                            layer._replace(
                                weight=_twin(layer.weight), bias=None if layer.bias is None else _twin(layer.bias)
                            )
                            for layer in run.gathered_layers(dtype=policy_dtype(self))
                        ]
                        first = layers[0].weight
                        for rows in sizes:
                            x = torch.zeros((rows, first.shape[1]), dtype=first.dtype, device=first.device)
                            self._warm_up(x.requires_grad_(below), layers, differentiable)
                    below = trainable
        for device in devices:
            torch.cuda.synchronize(device)
        return time.perf_counter() - begun

    def _warm_up(self, x: Tensor, layers: list[Layer], differentiable: bool) -> None:
        """Launch the kernels of one run, to compile them."""
        with torch.set_grad_enabled(differentiable):
            dtype = check_call(x, layers)
            if paths.why_reference(x, layers, dtype, self._backend, self._recompute) is not None:
                return
            y = run_kernels(x, layers, dtype, self._recompute, self._backend)
            leaves = [tensor for layer in layers for tensor in layer[:2] if tensor is not None] + [x]
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            if differentiable and wanted:
                torch.autograd.grad(y, wanted, torch.zeros_like(y))

    def explain(self, batch_size: int, dtype: torch.dtype | None = None, device: Any = None) -> Plan:
        """Explain how a batch of this size runs: paths with their reasons, kernels, tiles, FLOPs, bytes, the floor.

        Args:
            batch_size: the number of rows of the input.
            dtype: the dtype of the products. By default autocast's if it is on, else that of fully_shard's policy for
                mixed precision or of the parameters.
            device: a torch device, by default that of the parameters; or a name in `DEVICES`, such as "NVIDIA H200" or
                "h200", for a GPU that this machine need not have.

        Returns:
            A record whose `str` is a table. Its numbers are for a training step in which the input needs no gradient.

        Raises:
            ValueError: a batch size below 0 or above 2^40, an unknown device, or a network without parameters or whose
                input is not rows of features.
            TypeError: `dtype` is not a floating-point torch.dtype.
        """
        return explain(self, batch_size, dtype, device)


for method in (FusedSequence.explain, FusedSequence.warmup):
    method.__qualname__ = method.__name__  # for Python's errors about arguments: users do not know FusedSequence


def _delegated(name: str) -> Any:
    """A property of FusedLinear that reads the attribute of its child `linear`."""

    def read(layer: FusedLinear) -> Any:
        return getattr(layer.linear, name)

    def delete(layer: FusedLinear) -> None:
        delattr(layer.linear, name)

    return property(read, fdel=delete, doc=f"`linear.{name}`; may be assigned.")


class FusedLinear(FusedSequence, LinearWithActivation):
    """h = a(x Wᵀ + b): an `nn.Linear` with its activation. It runs as a fused kernel on a GPU, else in plain torch.

    The `nn.Linear` is its child `linear`. Initialisers, quantisers and adapters, which act on every `nn.Linear` of a
    model, find that child and leave the activation in place. `state_dict` keys and parameter names are `linear.weight`
    and `linear.bias`. `load_state_dict` also accepts the keys of an `nn.Linear`, `weight` and `bias`. The layer's
    attributes `weight`, `bias`, `in_features` and `out_features` are those of the child.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`.
        activation: a name, an `nn.Module` class or instance, a function such as `torch.relu`; None is the identity.
        backend: "auto", "triton" (an error if the kernels cannot run) or "reference" (plain torch).

    Attributes:
        linear: the `nn.Linear`.
        activation: the `Activation`. Whatever the constructor accepts may be assigned.

    Shape:
        input (..., in_features) -> (..., out_features), in the input's dtype, or autocast's if it is on.

    Raises:
        ValueError: a negative width, an unknown activation or backend.
        TypeError: a width that is not a whole number, or an `activation` that is none of the above.
        RuntimeError: in a call: the errors of `nn.Linear`, or the kernels cannot run with backend="triton".
    """

    in_features = _delegated("in_features")
    out_features = _delegated("out_features")
    weight = _delegated("weight")
    bias = _delegated("bias")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str | Activation | nn.Module | type[nn.Module] | Callable[..., Tensor] | None = None,
        *,
        backend: settings.Backend = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        in_features = checked_width(in_features, "in_features")
        out_features = checked_width(out_features, "out_features")
        activation = resolve(activation)
        backend = settings.check_backend(backend)
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self.activation = activation
        self._backend = backend

    def forward(self, input: Tensor) -> Tensor:
        return self._forward(input)

    def reset_parameters(self) -> None:
        """Initialise the parameters as `nn.Linear` does."""
        self.linear.reset_parameters()

    def extra_repr(self) -> str:
        return f"activation={self.activation}"

    def __prepare_scriptable__(self) -> nn.Module:
        """An nn.Sequential that computes the same, for torch.jit.script."""
        activation = _activation_maker(self.activation, {}, "activation")()
        return nn.Sequential(OrderedDict(linear=self.linear, activation=activation)).train(self.training)

    def _ordered_children(self) -> tuple[Any, ...]:
        return self.parts

    def _ordered_names(self) -> tuple[str, ...]:
        return ("linear", "activation")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in DELEGATED:  # nn.Module would register a parameter before it looks for a property
            setattr(self.linear, name, value)
            return
        if name == "activation":
            value = resolve(value)
        super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        parent: Any = super()
        parent.__setstate__(state)
        if "linear" not in self._modules:
            self._become_parent()

    def _become_parent(self) -> None:
        """Move the parameters to a child `linear`. The layer comes from an old pickle, in which it was an nn.Linear."""
        attributes: Any = self.__dict__
        weight, bias = (self._parameters.pop(name) for name in ("weight", "bias"))
        width_in, width_out = (attributes.pop(name) for name in ("in_features", "out_features"))
        linear: Any = nn.Linear(width_in, width_out, bias is not None, device="meta").train(self.training)
        linear.weight, linear.bias = weight, bias
        self.linear = linear

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        for name in ("weight", "bias"):  # keys of an nn.Linear; next to our own key, torch reports them as unexpected
            own = f"{prefix}linear.{name}"
            if prefix + name in state_dict and own not in state_dict:
                state_dict[own] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


DELEGATED = frozenset(name for name, member in vars(FusedLinear).items() if isinstance(member, property))


class FusedMLP(FusedSequence, nn.Sequential):
    """H_l = a(H_{l-1} W_lᵀ + b_l): a multi-layer perceptron that runs as fused kernels on a GPU.

    Its arguments, children and `state_dict` keys are those of `torchvision.ops.MLP`. A hidden layer is a Linear, a norm
    if there is one, an activation and Dropout. The last layer is a Linear, the output activation if there is one, and
    Dropout. On a CPU these modules run themselves. On the kernels, Dropout draws other random numbers than nn.Dropout,
    from the same generator.

    Args:
        in_channels: width of the input.
        hidden_channels: width of every layer, the output's last; a sequence, an array or a tensor.
        norm_layer: a function from a width to the module between a hidden Linear and its activation.
        activation_layer: an `nn.Module` class or instance, a function that returns a module, a name, or a function of
            torch such as `torch.relu`.
        inplace: passed to the activation and to Dropout if given.
        bias: True if the Linear layers have a bias.
        dropout: the probability of Dropout.
        output_activation: the activation after the last Linear, given as `activation_layer`.
        recompute: True: save only the input for backward, and compute the hidden layers again. Norms split the layers
            into runs, and the input of each run is saved. False: save one tensor for each layer. None: the faster one.
        backend: "auto", "triton" (an error if the kernels cannot run) or "reference" (plain torch).
        device, dtype: those of the parameters.

    Shape:
        input (..., in_channels) -> (..., hidden_channels[-1]), in the input's dtype, or autocast's if it is on.

    Raises:
        ValueError: a negative width, no layer at all, a probability outside [0, 1], an unknown activation or backend.
        TypeError: a width that is not a whole number, or `hidden_channels` that is not a sequence.
        RuntimeError: in a call, as `FusedLinear`.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: Sequence[int],
        norm_layer: Callable[..., nn.Module] | None = None,
        activation_layer: str | Activation | nn.Module | Callable[..., nn.Module | Tensor] | None = nn.ReLU,
        inplace: bool | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        *,
        output_activation: str | Activation | nn.Module | Callable[..., nn.Module | Tensor] | None = None,
        recompute: bool | None = None,
        backend: settings.Backend = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        in_channels = checked_width(in_channels, "in_channels")
        widths = checked_widths(hidden_channels, "hidden_channels")
        dropout = checked_probability(dropout, "dropout")
        if norm_layer is not None and not callable(norm_layer):
            raise TypeError(f"norm_layer is {norm_layer!r}; it needs to make a module when called with a width")
        backend = settings.check_backend(backend)

        where = {"device": device, "dtype": dtype}
        in_place = {} if inplace is None else {"inplace": inplace}
        make_hidden = _activation_maker(activation_layer, in_place, "activation_layer")
        make_output = _activation_maker(output_activation, in_place, "output_activation")
        children: list[nn.Module] = []
        for width_in, width_out in zip([in_channels, *widths[:-1]], widths[:-1]):
            children.append(nn.Linear(width_in, width_out, bias=bias, **where))
            if norm_layer is not None:
                norm = norm_layer(width_out)
                if not isinstance(norm, nn.Module):
                    raise TypeError(f"norm_layer returned {type(norm).__name__}; it needs to return an nn.Module")
                children.append(norm.to(device=device, dtype=dtype))
            children += [make_hidden(), nn.Dropout(dropout, **in_place)]
        children.append(nn.Linear([in_channels, *widths][-2], widths[-1], bias=bias, **where))
        if output_activation is not None:
            children.append(make_output())
        children.append(nn.Dropout(dropout, **in_place))
        super().__init__(*children)
        self._backend = backend
        self.recompute = recompute

    @classmethod
    def from_sequential(
        cls, sequential: nn.Sequential, *, recompute: bool | None = None, backend: settings.Backend = "auto"
    ) -> FusedMLP:
        """A FusedMLP with the modules of `sequential` itself, and so with the same parameters and `state_dict` keys.

        Children that are not a Linear, an activation or Dropout are called as modules.

        Raises:
            TypeError: `sequential` is not an nn.Sequential.
            ValueError: it has a forward, hooks or state of its own, or the backend is unknown.
        """
        if not isinstance(sequential, nn.Sequential):
            raise TypeError(
                f"sequential is {type(sequential).__name__}; it needs to be an nn.Sequential; "
                "for a single layer there is FusedLinear"
            )
        kind, own = type(sequential), vars(sequential)
        hooked = settings.has_hooks(sequential) or any(map(own.get, settings.STATE_HOOKS))
        more = {
            "a forward of its own": kind.forward not in (Sequential.forward, FusedMLP.forward)
            or (kind.__call__, kind.__iter__) != (Sequential.__call__, Sequential.__iter__),
            "hooks, or a forward patched onto it": hooked,
            "parameters, buffers or extra state of its own": bool(own["_parameters"] or own["_buffers"])
            or kind.get_extra_state is not Sequential.get_extra_state,
        }
        if found := [name for name, is_there in more.items() if is_there]:
            raise ValueError(
                f"sequential has {found[0]}, and from_sequential takes only its children; "
                "fuse(sequential) keeps the rest; nn.Sequential(*sequential) leaves it out"
            )
        backend = settings.check_backend(backend)
        model = cls.__new__(cls)
        nn.Sequential.__init__(model, OrderedDict(sequential._modules))
        model.training = sequential.training
        model._backend = backend
        model.recompute = recompute
        return model

    def forward(self, input: Tensor) -> Tensor:
        """y (..., d_L) for input (..., d_0)."""
        return self._forward(input)

    def __prepare_scriptable__(self) -> nn.Module:
        """The nn.Sequential of the same children, for torch.jit.script."""
        own_forward = type(self).forward is not FusedMLP.forward
        return self if own_forward else plain_twin(self, nn.Sequential)

    def __getitem__(self, index: slice | int) -> Any:
        """One child; or, for a slice, an nn.Sequential of the same modules."""
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)


def _twin(parameter: Tensor) -> Tensor:
    """A new leaf on the same memory. If the parameter was created under torch.inference_mode, it needs no gradient."""
    return parameter.detach().requires_grad_(parameter.requires_grad and not parameter.is_inference())


def _raise_if_wrong(input: Tensor, linear: Any) -> None:
    """Raise the error of `check_call`, which is clearer than torch's, if the input does not fit the layer."""
    try:
        check_call(input, (Layer(linear_weight(linear), linear.bias, IDENTITY),))
    except (RuntimeError, TypeError) as clearer:
        raise clearer from None


def _activation_maker(
    activation: str | Activation | nn.Module | Callable[..., Any] | None, in_place: dict[str, bool], argument: str
) -> Callable[[], nn.Module]:
    """A function that returns a new activation module for every layer."""
    if isinstance(activation, nn.Module):
        return lambda: copy.deepcopy(activation)
    if activation is None or isinstance(activation, str | Activation) or find(activation) is not None:
        resolved = resolve(activation, argument)
        kind = resolved.module
        if kind is not None and find(module := kind(**resolved.parameters)) is resolved:
            return lambda: kind(**resolved.parameters, **(in_place if hasattr(module, "inplace") else {}))
        return lambda: Pointwise(resolved)
    if not callable(activation):
        raise TypeError(f"{argument} is {activation!r}; it needs to be a name, an nn.Module class or instance, or None")
    return lambda: _called(activation, in_place, argument)


def _called(make: Callable[..., Any], in_place: dict[str, bool], argument: str) -> nn.Module:
    """The module that `make` returns. Raises TypeError if it returns none."""
    try:
        module = make(**in_place)
    except TypeError as error:
        why = first_line(error)
    else:
        if isinstance(module, nn.Module):
            return module
        why = f"it returned {type(module).__name__}"
    arguments = f"with inplace={in_place['inplace']}" if in_place else "without arguments"
    raise TypeError(
        f"{argument} is {name_in_sentences(make)}, which makes no module when called {arguments} ({why}); it needs to "
        "be an nn.Module class or instance, a name, or an activation function, such as torch.relu"
    )
