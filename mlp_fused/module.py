"""FusedLinear and FusedMLP: nn.Linear and nn.Sequential, whose forward and backward run as fused kernels on a GPU."""

from __future__ import annotations

import copy
import functools
import itertools
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import BuiltinFunctionType, MethodType, NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint

from . import memory
from .engine import paths
from .engine.layer_path import IDENTITY, LayerPath
from .engine.originals import (
    ADDMM,
    DROPOUT,
    LINEAR,
    PARAMETERS,
    Code,
    Dropout,
    Identity,
    Linear,
    Sequential,
    is_dropout_torchs,
    why_changed,
    why_hidden,
    why_mode,
    why_replaced,
)
from .engine.recognize import find, functions_called, path_of, resolve
from .functional import (
    Decision,
    Layer,
    can_checkpoint,
    check_call,
    find_path,
    run_kernels,
    run_path,
    settings,
)
from .kernels import devices
from .kernels.activation import Activation

__all__ = ["FusedLinear", "FusedMLP", "Pointwise"]


class Pointwise(nn.Module):
    """h = a(z) by the activation's name, in plain torch: for the ones that torch.nn has no class for.

    Args:
        activation: a name, an `nn.Module` class or instance.
        parameters: the activation's own, such as `negative_slope=0.2`.
    """

    def __init__(self, activation: str | Activation | nn.Module | type[nn.Module], **parameters: float) -> None:
        super().__init__()
        self.activation = resolve(activation).bind(**parameters)

    def forward(self, input: Tensor) -> Tensor:
        return self.activation(input)

    def extra_repr(self) -> str:
        return str(self.activation)


# None where it is not torch's own, so that it is called.
SEQUENTIAL_FORWARD = Sequential.forward if why_changed(Sequential, Sequential) is None else None


class WithBackend:
    """A module with the user's choice of what computes it."""

    _backend: paths.Backend = "auto"

    @property
    def backend(self) -> paths.Backend:
        """ "auto", "triton" or "reference"; may be assigned."""
        return self._backend

    @backend.setter
    def backend(self, backend: paths.Backend) -> None:
        self._backend = paths.check_backend(backend)


class Chain(WithBackend, nn.Module):
    """What calls modules one after the other, and runs those of them that kernels can take as kernels."""

    _recompute: bool | None = None
    _segments: _Segments | None = None  # remembered between calls

    def _links(self) -> tuple[Any, ...]:
        """What is called, in order: modules, and functions of a tensor."""
        return tuple(self._modules.values())

    def _link_names(self) -> tuple[str, ...]:
        """By what names they are found."""
        return tuple(self._modules)

    @property
    def recompute(self) -> bool | None:
        """True, False, or None for whatever is faster; may be assigned."""
        return self._recompute

    @recompute.setter
    def recompute(self, recompute: bool | None) -> None:
        self._recompute = paths.check_recompute(recompute)

    def _forward(self, input: Tensor) -> Tensor:
        if Sequential.forward is not SEQUENTIAL_FORWARD and isinstance(self, Sequential):
            return Sequential.forward(self, input)
        if not self._wants_kernels():
            on_cpu = isinstance(input, Tensor) and input.device.type == "cpu"
            if on_cpu and not (self._recompute and can_checkpoint()):
                return self._forward_as_modules(input)
        if torch.compiler.is_compiling():
            for run in runs_of(self._links(), drops=False):  # a compiler draws random numbers itself
                input = self._run(run, input)
            return input
        segments = self._segments
        if segments is None or not segments.hold(self):
            segments = self._segments = _Segments(self)
            if self._wants_kernels():
                segments.refuse_split(self)
            if isinstance(input, Tensor) and input.is_cuda:
                segments.log_reasons()
        try:
            for run in segments.runs:
                input = self._run(run, input)
        except torch.OutOfMemoryError as error:
            memory.explain(error, self, input.shape[:-1].numel())
            raise
        return input

    def _run(self, run: _Run, input: Tensor) -> Tensor:
        """One run: as the last call took it where nothing has changed since, or decided anew."""
        if run.linears:
            kind = input.device.type if isinstance(input, Tensor) and input.dim() == 2 else ""
            repeats = kind in ("cuda", "cpu") and not torch.compiler.is_compiling()
            if repeats:
                weights, biases = run.parameters()
                now = settings(kind, self._backend, self._recompute)
                for decision in run.decisions:
                    if decision.holds(input, weights, biases, now):
                        return run_path(input, weights, biases, decision.path)
            if any(run.dropouts) and paths.is_watched():
                return run.call(input)  # no operator draws random numbers
            layers = run.layers()
            dtype = check_call(input, layers)
            if paths.why_reference(input, layers, dtype, self._backend, self._recompute) is None:
                if repeats and not paths.is_watched() and Decision.can_hold(input, weights):
                    path = find_path(input, layers, dtype, self._recompute, self._backend)
                    if not (self._recompute and isinstance(path, LayerPath)):  # which torch's checkpoint runs
                        run.decisions = [Decision(input, weights, biases, now, path), *run.decisions[:1]]
                        return run_path(input, weights, biases, path)
                return run_kernels(input, layers, dtype, self._recompute, self._backend)
        if run.linears and self._recompute and can_checkpoint():
            # nn.Dropout draws random numbers in here. torch puts its generator back for the second run, since 2.10 also
            # within a CUDA graph's capture, which 2.9 refuses.
            return checkpoint(run.call, input, use_reentrant=False)
        return run.call(input)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is only remembered between calls: kernels are not for pickling."""
        return {**self.__dict__, "_segments": None}

    def _wants_kernels(self) -> bool:
        """Whether the user asked for kernels even on a CPU, which is where the interpreter runs them."""
        return (paths.DEFAULT_BACKEND if self._backend == "auto" else self._backend) == "triton"

    def _forward_as_modules(self, input: Tensor) -> Tensor:
        """The modules called as they are, on a CPU and under torch.compile.

        A mistake in the input is explained after the fact: nothing was launched by then.
        """
        output = input
        idle: bool | None = None  # whether Dropout that drops nothing may be left out; asked once a call
        try:
            for child in self._links():
                if type(child) is Dropout and child.p == 0 and not _are_hooked((child.__dict__,)):
                    if idle is None:
                        watched = _has_any_global_hook() or (torch._C._len_torch_function_stack() and why_mode())
                        idle = not watched and is_dropout_torchs()
                    if idle:
                        continue  # it does nothing, at the price of two calls
                output = child(output)
        except (RuntimeError, TypeError):
            first = self._links()[0]
            if why_unfused(first) is None:
                _raise_if_wrong(input, first)
            raise
        return output

    def warmup(self, *batch_sizes: int, training: bool = True) -> float:
        """Compile ahead what batches of these sizes need, so that the first of them does not wait; returns seconds.

        Every run of layers is gone through once without gradients, and with `training` once forward and backward, on
        zeros, in the dtype that a call would compute in (call it under autocast where the model runs under it). Norms
        are left out, Dropout drops where gradients are recorded, and torch's generators are put back: no statistics
        change, no random number is used up, no `.grad` is written. A batch of about the same size needs nothing else;
        one of another order of magnitude may take other tiles.

        Raises:
            ValueError: no batch size, or one below 1.
            RuntimeError: as a call does, where backend="triton" cannot run.
        """
        if not batch_sizes:
            raise ValueError("batch_sizes is empty; it needs one number of rows or more")
        for batch_size in batch_sizes:
            if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
                raise ValueError(f"batch_size is {batch_size!r}; it needs to be a number of rows, 1 or more")
        begun = time.perf_counter()
        devices = {parameter.device for parameter in self.parameters() if parameter.is_cuda}
        with torch.inference_mode(False), torch.random.fork_rng([device.index for device in devices]):
            for differentiable in (False, True)[: 1 + training]:
                below = False  # whether anything before a run needs gradients
                for run in runs_of(self._links(), differentiable):
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
                            for layer in run.gathered_layers(dtype=_policy_dtype(self))
                        ]
                        first = layers[0].weight
                        for rows in batch_sizes:
                            x = torch.zeros((rows, first.shape[1]), dtype=first.dtype, device=first.device)
                            self._warm_up(x.requires_grad_(below), layers, differentiable)
                    below = trainable
        for device in devices:
            torch.cuda.synchronize(device)
        return time.perf_counter() - begun

    def _warm_up(self, x: Tensor, layers: list[Layer], differentiable: bool) -> None:
        """One run's kernels, launched for their own sake."""
        with torch.set_grad_enabled(differentiable):
            dtype = check_call(x, layers)
            if paths.why_reference(x, layers, dtype, self._backend, self._recompute) is not None:
                return
            y = run_kernels(x, layers, dtype, self._recompute, self._backend)
            leaves = [each for layer in layers for each in layer[:2] if each is not None] + [x]
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            if differentiable and wanted:
                torch.autograd.grad(y, wanted, torch.zeros_like(y))

    def explain(self, batch_size: int, dtype: torch.dtype | None = None, device: Any = None) -> paths.Plan:
        """What would run for a batch of that many rows, and why: paths, kernels, tiles, FLOPs, bytes, the floor.

        Args:
            batch_size: rows of the input.
            dtype: what the products are computed in; by default autocast's where it is on, else the parameters', or
                that of fully_shard's policy for mixed precision.
            device: a torch device, by default the parameters'; or the name of one in `DEVICES`, such as "NVIDIA H200",
                to ask about a GPU that is not there.

        Returns:
            A record whose `str` is a table. Its numbers are for a training step in which the input needs no gradient.

        Raises:
            ValueError: a negative batch size, a network without parameters, or not over rows of features.
        """
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 0:
            raise ValueError(f"batch_size is {batch_size!r}; it needs to be a number of rows, 0 or more")
        parameter = next(self.parameters(), None)
        if parameter is None:
            raise ValueError("the network has no parameters; there is nothing to explain")
        known = devices.DEVICES.get(device) if isinstance(device, str) else None
        where = torch.device("meta") if known else torch.device(device or parameter.device)
        given = _policy_dtype(self) or parameter.dtype  # to a call
        dtype = dtype or paths.compute_dtype(given, where.type)
        precision = paths.float32_precision() if dtype == torch.float32 else "ieee"
        gpu = known
        if known is None and (where.type == "cuda" or self._wants_kernels()):
            gpu = devices.describe(where.type, where.index or 0)

        runs: list[paths.RunPlan] = []
        kept = 0
        links = self._links()
        first = next((child for child in links if is_linear(child)), None)
        width = 1 if first is None else _weight(first).shape[1]
        flow = torch.empty((batch_size, width), dtype=dtype, device="meta")
        link_names = iter(self._link_names())
        for run in runs_of(links):
            names = ", ".join(f"{name} {name_of(child)}" for child, name in zip(run.children, link_names))
            layers = run.gathered_layers("meta", _policy_dtype(self))
            reason = run.reason
            if layers:
                reason = paths.why_not(layers, dtype, where, self._backend, planned=known is not None)
            trainable = [layer.weight.requires_grad for layer in layers]
            biased = [layer.bias is not None and layer.bias.requires_grad for layer in layers]
            needs_input_grad = flow.requires_grad  # of the input itself never; of an inner run's mostly
            input_size = dtype.itemsize if runs else max(dtype.itemsize, given.itemsize)
            flow, kept_by_torch = _kept_by_torch(run.children, flow)
            widths, biases = _widths(layers), [layer.bias is not None for layer in layers]
            training = any(trainable) or any(biased) or needs_input_grad
            if layers and reason is None and gpu is not None and not self._wants_kernels():
                activations = [layer.activation for layer in layers]
                reason = paths.why_torch(widths, activations, dtype, precision, training, self._recompute, gpu)
            path: paths.NetworkPlan | str = ""
            if layers and reason is None:
                assert gpu is not None
                path = paths.network_path(
                    widths,
                    tuple((*w.stride(), 0 if b is None else b.stride(0)) for w, b, *_ in layers),
                    tuple(layer.activation for layer in layers),
                    dtype,
                    precision,
                    gpu,
                    training,
                    self._recompute,
                    input_size if input_size > dtype.itemsize else 0,
                    drops=any(run.dropouts),
                    torch_too=not self._wants_kernels(),
                )
            if isinstance(path, paths.NetworkPlan):
                gradients = paths.gradients_of(widths, tuple(trainable), tuple(biased), needs_input_grad)
                kernels = paths.plan_network(batch_size, path, biases, gradients, needs_input_grad)
                kept += path.kept_elements(batch_size) * dtype.itemsize
                if path.formulation is not None:  # the input is kept as it is given
                    kept += batch_size * widths[0] * (input_size - dtype.itemsize)
                runs.append(paths.RunPlan(names, "network", path.explanation, tuple(kernels)))
                continue
            kernels = paths.plan_layers(  # of the reference too: the least that the work takes
                batch_size,
                list(itertools.pairwise(widths)),
                [layer.activation for layer in layers],
                dtype,
                biases=biases,
                trainable=[weight or bias for weight, bias in zip(trainable, biased)],
                needs_input_grad=needs_input_grad,
                precision=precision,
                dropouts=run.dropouts if reason is None else None,
            )
            if reason is None:
                kept += paths.kept_elements(batch_size, layers, trainable, needs_input_grad) * dtype.itemsize
                kept += paths.SEED_BYTES if training and any(run.dropouts) else 0
                runs.append(paths.RunPlan(names, "layer", str(path), tuple(kernels)))
            else:
                kept += kept_by_torch
                runs.append(paths.RunPlan(names, "reference", reason, tuple(kernels)))
        return paths.Plan(batch_size, dtype, precision, gpu, tuple(runs), kept, torch_too=not self._wants_kernels())


def _delegated(name: str) -> Any:
    """An attribute of a FusedLinear that is its `linear`'s."""

    def read(layer: FusedLinear) -> Any:
        return getattr(layer.linear, name)

    def delete(layer: FusedLinear) -> None:
        delattr(layer.linear, name)

    return property(read, fdel=delete, doc=f"`linear.{name}`; may be assigned.")


class FusedLinear(Chain):
    """h = a(x Wᵀ + b): an `nn.Linear` with its activation, a fused kernel on a GPU, plain torch elsewhere.

    The `nn.Linear` is its child `linear`. Whatever acts on every `nn.Linear` of a model, such as an initialiser, a
    quantiser or an adapter, finds that child and leaves the activation in place. `state_dict` keys and parameter names
    are `linear.weight` and `linear.bias`; `load_state_dict` also takes `weight` and `bias`, as an `nn.Linear` has them.
    `weight`, `bias`, `in_features` and `out_features` of the layer are the child's.

    Args:
        in_features, out_features, bias, device, dtype: as `nn.Linear`.
        activation: a name, an `nn.Module` class or instance; None is the identity.
        backend: "auto", "triton" (an error where the kernels cannot run) or "reference" (plain torch).

    Attributes:
        linear: the `nn.Linear`.
        activation: the activation's row of the table.

    Raises:
        ValueError: a width below 1, an unknown activation or backend.
        TypeError: a width that is not an integer, an activation of another kind.
    """

    linear: nn.Linear
    activation: Activation

    in_features = _delegated("in_features")
    out_features = _delegated("out_features")
    weight = _delegated("weight")
    bias = _delegated("bias")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str | Activation | nn.Module | type[nn.Module] | None = None,
        *,
        backend: paths.Backend = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_width(in_features, "in_features")
        _check_width(out_features, "out_features")
        resolved = resolve(activation)
        backend = paths.check_backend(backend)
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self.activation = resolved
        self._backend = backend

    def forward(self, input: Tensor) -> Tensor:
        return self._forward(input)

    def reset_parameters(self) -> None:
        """Initialise the parameters as `nn.Linear` does."""
        self.linear.reset_parameters()

    def extra_repr(self) -> str:
        return f"activation={self.activation}"

    def _links(self) -> tuple[Any, ...]:
        return (self._modules["linear"], self.activation)

    def _link_names(self) -> tuple[str, ...]:
        return ("linear", "activation")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in DELEGATED:  # nn.Module takes a parameter for itself before it looks for a property
            setattr(self.linear, name, value)
        else:
            super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "linear" not in self._modules:
            self._become_parent()

    def _become_parent(self) -> None:
        """Give the parameters to a child: the layer was pickled when it was an nn.Linear itself."""
        attributes: Any = self.__dict__
        weight, bias = (self._parameters.pop(name) for name in ("weight", "bias"))
        width_in, width_out = (attributes.pop(name) for name in ("in_features", "out_features"))
        linear: Any = nn.Linear(width_in, width_out, bias is not None, device="meta").train(self.training)
        linear.weight, linear.bias = weight, bias
        self.linear = linear

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        for name in ("weight", "bias"):  # an nn.Linear's keys; torch reports one that stands beside our own
            own = f"{prefix}linear.{name}"
            if prefix + name in state_dict and own not in state_dict:
                state_dict[own] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


DELEGATED = frozenset(name for name, member in vars(FusedLinear).items() if isinstance(member, property))


class FusedMLP(Chain, nn.Sequential):
    """H_l = a(H_{l-1} W_lᵀ + b_l): `torchvision.ops.MLP`'s arguments, children and keys; fused kernels on a GPU.

    Its children are the real `nn.Linear`, norm, activation and `nn.Dropout` modules: every hidden layer is Linear,
    norm, activation, Dropout; then the last Linear, the output activation, and Dropout. On a CPU they run as they are;
    on kernels Dropout draws other random numbers than nn.Dropout, from the same generator.

    Args:
        in_channels: width of the input.
        hidden_channels: width of every layer, the output's last.
        norm_layer: called with a width, makes the module between a hidden Linear and its activation.
        activation_layer: an `nn.Module` class, anything that makes a module when called, an instance, or a name.
        inplace: passed to the activation and to Dropout where given.
        bias: whether the Linear layers have one.
        dropout: the probability of Dropout.
        output_activation: after the last Linear, as `activation_layer`.
        recompute: what is kept for backward. True: the input alone (of each run of layers, where norms stand between
            them), hidden layers are computed again. False: one tensor of each layer. None: whatever is faster.
        backend: "auto", "triton" (an error where the kernels cannot run) or "reference" (plain torch).
        device, dtype: of the parameters.

    Raises:
        ValueError: a width below 1, no layer at all, a probability outside [0, 1], an unknown activation or backend.
        TypeError: a width that is not an integer, `hidden_channels` that is not a sequence.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: Sequence[int],
        norm_layer: Callable[..., nn.Module] | None = None,
        activation_layer: str | Activation | nn.Module | Callable[..., nn.Module] | None = nn.ReLU,
        inplace: bool | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        *,
        output_activation: str | Activation | nn.Module | Callable[..., nn.Module] | None = None,
        recompute: bool | None = None,
        backend: paths.Backend = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_width(in_channels, "in_channels")
        if isinstance(hidden_channels, str | bytes) or not isinstance(hidden_channels, Iterable):
            raise TypeError(
                f"hidden_channels is {hidden_channels!r}; it needs to be a sequence of widths, the output's last, "
                "such as [512, 10]"
            )
        widths = list(hidden_channels)
        if not widths:
            raise ValueError(
                "hidden_channels is empty; it needs one width a layer, the output's last, such as [512, 10]"
            )
        for index, width in enumerate(widths):
            _check_width(width, f"hidden_channels[{index}]")
        if isinstance(dropout, bool) or not isinstance(dropout, int | float):
            raise TypeError(f"dropout is {dropout!r}; it needs to be a probability, a number from 0 to 1")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout is {dropout}; it needs to be a probability, from 0 to 1")
        if norm_layer is not None and not callable(norm_layer):
            raise TypeError(f"norm_layer is {norm_layer!r}; it needs to make a module when called with a width")
        backend = paths.check_backend(backend)

        where = {"device": device, "dtype": dtype}
        in_place = {} if inplace is None else {"inplace": inplace}
        make_hidden = _activation_maker(activation_layer, in_place, "activation_layer")
        make_output = _activation_maker(output_activation, in_place, "output_activation")
        children: list[nn.Module] = []
        for width_in, width_out in zip([in_channels, *widths[:-1]], widths[:-1]):
            children.append(nn.Linear(width_in, width_out, bias=bias, **where))
            if norm_layer is not None:
                children.append(norm_layer(width_out).to(device=device, dtype=dtype))
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
        cls, sequential: nn.Sequential, *, recompute: bool | None = None, backend: paths.Backend = "auto"
    ) -> FusedMLP:
        """The same network, fused: it takes over `sequential`'s own modules, so parameters and state_dict keys are one.

        Children that are not a Linear, an activation or Dropout run as themselves.

        Raises:
            TypeError: `sequential` is not an nn.Sequential.
            ValueError: an unknown backend.
        """
        if not isinstance(sequential, nn.Sequential):
            raise TypeError(
                f"sequential is {type(sequential).__name__}; it needs to be an nn.Sequential; "
                "for a single layer there is FusedLinear"
            )
        backend = paths.check_backend(backend)
        model = cls.__new__(cls)
        nn.Sequential.__init__(model, OrderedDict(sequential._modules))
        model.training = sequential.training
        model._backend = backend
        model.recompute = recompute
        return model

    forward = Chain._forward

    def __getitem__(self, index: slice | int) -> Any:
        """One child; or, for a slice, an nn.Sequential of the same modules."""
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)


def _twin(parameter: Tensor) -> Tensor:
    """The same memory, as a leaf of its own; one made under torch.inference_mode takes no gradients."""
    return parameter.detach().requires_grad_(parameter.requires_grad and not parameter.is_inference())


def _widths(layers: Sequence[Layer]) -> tuple[int, ...]:
    """Of the input to the output; empty where there is no layer."""
    return tuple(layer.weight.shape[1] for layer in layers[:1]) + tuple(layer.weight.shape[0] for layer in layers)


class _Run:
    """Neighbouring children: Linear layers with activations, which kernels can take; or one that runs as itself."""

    def __init__(self, children: list[Any], reason: str | None = None) -> None:
        self.children = children
        self.linears: list[tuple[nn.Module, Activation]] = []
        self.dropouts: list[float] = []  # after each of them, 0 where nothing is dropped
        self.owned: list[dict[str, Any]] = []  # the linears' dicts of parameters
        self.transposed: list[bool] = []  # which of the linears' weights are (in, out)
        self.any_transposed = False
        self.reason = reason  # why it runs as itself
        self.decisions: list[Decision] = []  # the last two paths: training and evaluation alternate

    def call(self, input: Tensor) -> Tensor:
        """The children as they are."""
        for child in self.children:
            input = child(input)
        return input

    def parameters(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Weights (out, in) and biases."""
        weights = tuple([owned["weight"] for owned in self.owned])
        if self.any_transposed:
            weights = tuple([each.t() if across else each for each, across in zip(weights, self.transposed)])
        return weights, tuple([owned["bias"] for owned in self.owned])

    def layers(self) -> tuple[Layer, ...]:
        return tuple(map(Layer, *self.parameters(), (activation for _, activation in self.linears), self.dropouts))

    def gathered_layers(self, device: str | None = None, dtype: torch.dtype | None = None) -> tuple[Layer, ...]:
        """The layers as a call finds them: FSDP gathers parameters before a forward, and shares them out after it.

        Those are zeros here, on their own device and of their own dtype, or others.
        """
        layers = []
        for (linear, _), layer in zip(self.linears, self.layers()):
            if getattr(linear, "_is_fsdp_managed_module", False):
                where = device or layer.weight.device
                bias = None if layer.bias is None else _stand_in(layer.bias, where, dtype)
                layer = layer._replace(weight=_stand_in(layer.weight, where, dtype), bias=bias)
            layers.append(layer)
        return tuple(layers)


class _Segments:
    """The runs of a network, and what tells whether they still are: looked at on every call, as children may change."""

    def __init__(self, model: Chain) -> None:
        self.children = model._links()
        self.runs = runs_of(self.children)
        inner = [child._modules["linear"] for child in self.children if isinstance(child, FusedLinear)]
        self.parts = (*self.children, *inner)
        self.types = [*map(type, self.parts)]
        self.dicts = [part.__dict__ for part in self.parts if isinstance(part, nn.Module)]
        self.plain = self._are_called_plainly()
        if not self.plain:
            return  # the next call parts the children again
        self.code = _code_of(self.parts)
        self.state = self.code.now()
        # What an activation is by, whether Dropout drops, and which Linear a FusedLinear has.
        settings: list[tuple[dict[str, Any], str]] = []
        for child in self.children:
            if isinstance(child, FusedLinear):
                settings += [(child._modules, "linear"), (child.__dict__, "activation")]
        for child in (child for run in self.runs if run.linears for child in run.children):
            if type(child) is Dropout:
                names = ["p", "training"] if child.p else ["p"]
            elif is_linear(child) or not isinstance(child, nn.Module):
                continue
            else:
                names = [name for name in child.__dict__ if not name.startswith("_") and name not in UNREAD]
                activation = find(child)
                decisive = (
                    {"activation"} if type(child) is Pointwise else set(activation.parameters if activation else ())
                )
                # What is computed, or a buffer, or no plain value, may change unseen.
                self.plain &= decisive <= set(names)
                self.plain &= all(isinstance(child.__dict__[name], PLAIN) for name in names)
            settings += [(child.__dict__, name) for name in names]
        # As columns, which `map` goes through without a call a row.
        self.holders = [holder for holder, _ in settings]
        self.names = [name for _, name in settings]
        self.values = [*map(dict.get, self.holders, self.names)]
        self.owned = [owned for run in self.runs for owned in run.owned for _ in PARAMETERS]
        self.owned_names = [name for run in self.runs for _ in run.owned for name in PARAMETERS]

    def hold(self, model: Chain) -> bool:
        """True if the children are the same, of the same kind, settings and code, without hooks or patches."""
        return (
            self.plain
            and model._links() == self.children
            and [*map(type, self.parts)] == self.types
            and self._are_called_plainly()
            and self.code.now() == self.state
            and all(map(dict.__contains__, self.owned, self.owned_names))
            and [*map(dict.get, self.holders, self.names)] == self.values
        )

    def _are_called_plainly(self) -> bool:
        """True if no child has a hook or a patched forward, and nothing else makes all of them run as modules."""
        return not (
            _are_hooked(self.dicts) or _has_any_global_hook() or (torch._C._len_torch_function_stack() and why_mode())
        )

    def log_reasons(self) -> None:
        """Log each reason, once a process, for which a Linear layer runs as a module."""
        for run in self.runs:
            if run.reason and is_linear(run.children[0]):
                paths.log_once(run.reason)

    def refuse_split(self, model: Chain) -> None:
        """Refuse layers that no one process has. (Others with hooks run as themselves, whatever the backend.)

        Raises:
            RuntimeError: a Linear is split over processes.
        """
        split = [child for run in self.runs if run.reason == SPLIT for child in run.children]
        names = [
            name for name, child in zip(model._link_names(), self.children) if any(child is each for each in split)
        ]
        if names:
            raise RuntimeError(f'backend is "triton", but of child {", ".join(names)}, {SPLIT}; or use backend="auto"')


def runs_of(children: Iterable[Any], training: bool | None = None, drops: bool = True) -> list[_Run]:
    """The children of a network, parted into runs.

    Args:
        training: as if in that mode, instead of each child's own.
        drops: whether a run may drop; otherwise Dropout that does runs as itself.
    """
    runs: list[_Run] = []
    run: _Run | None = None
    takes_activation = False  # whether the run's last Linear is still without one, and nothing dropped from it
    everywhere = why_modules()
    for child in children:
        why = everywhere or why_unfused(child)
        if why is None:
            linear, activation = child._links() if isinstance(child, FusedLinear) else (child, IDENTITY)
            if run is None:
                run = _Run([])
                runs.append(run)
            run.linears.append((linear, activation))
            run.dropouts.append(0.0)
            run.owned.append(linear._parameters)
            run.transposed.append(_is_transposed(linear))
            run.any_transposed = any(run.transposed)
            takes_activation = activation is IDENTITY
        elif (
            run is not None
            and everywhere is None
            and (p := _dropout(child, training)) is not None
            and not (p and (run.dropouts[-1] or not drops))  # a second one has a mask of its own
        ):
            if p:
                run.dropouts[-1] = p
                takes_activation = False
        elif (
            run is not None
            and takes_activation
            and everywhere is None
            and (found := find(child))
            and why_called(child, activation=found) is None
        ):
            run.linears[-1] = (run.linears[-1][0], found)
            takes_activation = found is IDENTITY
        else:
            if everywhere is None and not is_linear(child) and (found := find(child)):
                why = why_called(child, activation=found) or "it follows no Linear layer that it could be fused with"
            runs.append(_Run([child], why))
            run = None
            continue
        run.children.append(child)
    return runs


def why_modules() -> str | None:
    """The reason why every child of every network runs as a module; None where there is none."""
    if _has_any_global_hook():
        return "a global module hook is registered"
    return why_changed(Sequential, Sequential) or why_mode()


# Linear layers whose weight is (in, out), by path as none of these need be installed.
TRANSPOSED = ("transformers.pytorch_utils.Conv1D",)


def _is_transposed(module: Any) -> bool:
    """Whether a module is a Linear layer with its weight the other way round."""
    return path_of(type(module)) in TRANSPOSED


def is_linear(module: Any) -> bool:
    """Whether a module is a Linear layer of any kind."""
    return isinstance(module, Linear | FusedLinear) or _is_transposed(module)


def _weight(linear: Any) -> Tensor:
    """The weight of a Linear layer as (out, in)."""
    return linear.weight.t() if _is_transposed(linear) else linear.weight


def name_of(child: Any) -> str:
    """The name of a module, function or activation in sentences."""
    if isinstance(child, Activation):
        return str(child)
    return type(child).__name__ if isinstance(child, nn.Module) else getattr(child, "__name__", type(child).__name__)


def why_unfused(module: Any) -> str | None:
    """The reason why a module is no plain Linear layer, which kernels may take in place of a call; None where it is."""
    if not is_linear(module):
        return f"{name_of(module)} has no kernel"
    if isinstance(module, FusedLinear):
        linear = module._modules["linear"]
        if (why := why_called(module, FusedLinear)) is not None:
            return why
        if not isinstance(linear, Linear):
            return f"its linear is {name_of(linear)}, which has no kernel"
        return why_unfused(linear) or why_replaced((), module.activation.name)
    known, function = (type(module), ADDMM) if _is_transposed(module) else (Linear, LINEAR)
    if (why := why_called(module, known, (function,))) is not None:
        return why
    if "weight" not in module._parameters:
        return "its weight is parametrized"
    if "bias" not in module._parameters:
        return "its bias is no parameter of its own"
    return why_hidden(type(module))


def why_called(
    child: Any, known: type | None = None, functions: tuple[str, ...] = (), activation: Activation = IDENTITY
) -> str | None:
    """The reason why a child must be called: a hook, or code that is not the library's; None where there is none.

    Args:
        child: a module or a function.
        known: the class that a kernel stands for, by default the child's own.
        functions: the names of torch's functions that a call looks up.
        activation: what the child computes, if it is an activation.
    """
    if isinstance(child, nn.Module):
        if has_hooks(child):
            return _why_hooked(child)
        kind = type(child)
        if (why := why_changed(kind, known or kind)) is not None:
            return why
    return why_replaced(functions, activation.name)


def _why_hooked(module: nn.Module) -> str:
    if _is(module, "torch.distributed.fsdp", "FSDPModule"):
        return "fully_shard was called on it, whose hooks gather its parameters; on the whole network it stays fused"
    return SPLIT if _is_split(module._parameters.get("weight")) else "it has hooks, or a forward patched onto it"


def _code_of(parts: Iterable[Any]) -> Code:
    """The code that calls of those parts of a network come down to that a kernel could take the place of."""
    kinds: list[type] = []
    functions: list[str] = []
    for part in parts:
        found = None if is_linear(part) else find(part)
        if is_linear(part):
            functions.append(ADDMM if _is_transposed(part) else LINEAR)
        elif found is not None:
            functions += functions_called(found.name)
        elif type(part) is Dropout:
            functions.append(DROPOUT)
        else:
            continue
        if isinstance(part, nn.Module):
            kinds.append(type(part))
        if isinstance(part, FusedLinear):
            functions += functions_called(part.activation.name)
    return Code(kinds, functions)


SPLIT = "the weight is a DTensor, split over processes, whose parts hooks bring together"
UNREAD = ("training", "inplace", "in_features", "out_features")  # public attributes that no activation is by
PLAIN = (bool, int, float, str, NoneType, Activation, BuiltinFunctionType, MethodType, functools.partial)


def has_hooks(module: Any) -> bool:
    return isinstance(module, nn.Module) and _are_hooked([module.__dict__])


def _are_hooked(modules: Sequence[dict[str, Any]]) -> bool:
    """Whether the own attributes of modules show a hook, or a forward patched onto one."""
    for attributes in modules:  # a call of its own for each would double the time
        if (
            attributes["_forward_hooks"]
            or attributes["_forward_pre_hooks"]
            or attributes["_backward_hooks"]
            or attributes["_backward_pre_hooks"]
            or "forward" in attributes
        ):
            return True
    return False


def _is(thing: object, module: str, name: str) -> bool:
    """isinstance of a class that takes long to import: nothing is of it before that."""
    imported = sys.modules.get(module)
    return imported is not None and isinstance(thing, getattr(imported, name, ()))


def _policy_dtype(network: nn.Module) -> torch.dtype | None:
    """What fully_shard casts a network's parameters to for a call; None where they stay what they are."""
    if not _is(network, "torch.distributed.fsdp", "FSDPModule"):
        return None
    sharded: Any = network
    return sharded._get_fsdp_state()._mp_policy.param_dtype


def _is_split(tensor: object) -> bool:
    return _is(tensor, "torch.distributed.tensor", "DTensor")


def _stand_in(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Zeros like a tensor; like the whole of a DTensor."""
    like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype or tensor.dtype, device=device)
    return like.zero_().requires_grad_(tensor.requires_grad)


def _unhooked(module: nn.Module) -> nn.Module:
    """The same module without hooks."""
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        setattr(twin, hooks, OrderedDict())
    return twin


def _dropout(module: Any, training: bool | None) -> float | None:
    """The probability with which a module drops, 0 where it is idle or the identity; None: it is neither."""
    if type(module) is Identity:
        return 0.0 if why_called(module) is None else None
    if type(module) is not Dropout or not isinstance(module.p, int | float) or not 0 <= module.p <= 1:
        return None  # or Dropout that torch refuses
    if why_called(module, functions=(DROPOUT,)) is not None:
        return None
    return float(module.p) if (module.training if training is None else training) else 0.0


def _raise_if_wrong(input: Tensor, linear: Any) -> None:
    """Raise `check_call`'s sentence, in place of torch's, where the input does not fit the layer."""
    try:
        check_call(input, (Layer(_weight(linear), linear.bias, IDENTITY),))
    except (RuntimeError, TypeError) as sentence:
        raise sentence from None


def _check_width(width: object, argument: str) -> None:
    if isinstance(width, bool) or not isinstance(width, int):
        raise TypeError(f"{argument} is {width!r}; it needs to be a whole number, 1 or more")
    if width < 1:
        raise ValueError(f"{argument} is {width}; it needs to be 1 or more")


def _activation_maker(
    activation: str | Activation | nn.Module | Callable[..., nn.Module] | None, in_place: dict[str, bool], argument: str
) -> Callable[[], nn.Module]:
    """A function that makes one activation module a layer."""
    if isinstance(activation, nn.Module):
        return lambda: copy.deepcopy(activation)
    if activation is None or isinstance(activation, str | Activation):
        resolved = resolve(activation, argument)
        kind = resolved.module
        if kind is not None and find(made := kind(**resolved.parameters)) is resolved:
            return lambda: kind(**resolved.parameters, **(in_place if hasattr(made, "inplace") else {}))
        return lambda: Pointwise(resolved)
    if not callable(activation):
        raise TypeError(f"{argument} is {activation!r}; it needs to be a name, an nn.Module class or instance, or None")
    return lambda: activation(**in_place)


def _flat(children: Iterable[Any]) -> Iterator[Any]:
    """The children, with a FusedLinear's Linear and activation in its place."""
    for child in children:
        yield from child._links() if isinstance(child, FusedLinear) else (child,)


def _kept_by_torch(children: Sequence[Any], flow: Tensor) -> tuple[Tensor, int]:
    """What plain torch keeps for backward, bytes: read off a run of the children on meta tensors, parameters apart."""
    kept: dict[int, Tensor] = {}
    own: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in own:
            kept[key] = tensor
        return tensor

    flow = flow.detach().requires_grad_(flow.requires_grad)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for child in _flat(children):
            if not isinstance(child, nn.Module):
                flow = child(flow)
                continue
            state = {
                name: _stand_in(tensor, "meta", flow.dtype if tensor.is_floating_point() else None)
                for name, tensor in (*child.named_parameters(), *child.named_buffers())
            }
            if _is(child, "torch.distributed.fsdp", "FSDPModule") or any(map(_is_split, child.parameters())):
                child = _unhooked(child)  # its hooks would wait for the other processes
            own.update(tensor.untyped_storage()._cdata for tensor in state.values())
            try:
                flow = torch.func.functional_call(child, state, (flow,))
            except (RuntimeError, TypeError) as error:
                raise ValueError(
                    f"{type(child).__name__} does not take an input of shape {tuple(flow.shape)} ({error}); "
                    "explain knows networks over rows of features"
                ) from None
    return flow, sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
