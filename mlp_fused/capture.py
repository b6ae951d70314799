"""capture_step: a whole training step, forward, backward and optimizer, captured once as a CUDA graph.

With a small network, almost all the time goes into kernel launches. A replay is one launch. The recipe is torch's
whole-network capture (https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture): warm up on a side
stream, set the gradients to None, capture. The code around it saves and restores everything else.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .engine.settings import DEBUG, end_allocation
from .errors import whole_number

__all__ = ["CapturedStep", "capture_step"]

# Optimizers that take a learning rate in the device's memory without reading it back. SGD does too, if it is fused.
RATE_IN_MEMORY = (torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam)

Path = tuple[Any, ...]


def capture_step(
    model: nn.Module,
    loss_fn: Callable[[Any, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    *,
    warmup: int = 3,
) -> CapturedStep:
    """Capture `loss_fn(model(x), y).backward(); optimizer.step()` as a CUDA graph: `loss = step(x, y)` replays it.

    It takes any module. Capturing does not train: parameters, buffers, gradients, the optimizer's state and the random
    number generators are the same afterwards, also if it fails.

    The limits of CUDA graphs apply. Python runs only while the graph is captured. So shapes, training or evaluation
    mode, TF32 and autocast stay as they are in the capture. (Autocast is the context around this call, and covers model
    and loss.) Nothing may wait for a result (`.item()`, printing a tensor, `torch.nonzero`). To clip gradients, use a
    hook of `optimizer.register_step_pre_hook`, which is captured too. `GradScaler` is not supported; bfloat16 needs
    none.

    Args:
        model, loss_fn: the loss is `loss_fn(model(x), y)`, one element.
        optimizer: its step ends the graph. If it has an option `capturable`, that needs to be True. With Adam, AdamW,
            Adamax, NAdam, RAdam and SGD(fused=True), the learning rate may change between steps, whether it is a number
            or a tensor. With others, a new learning rate needs a new capture.
        x, y: a batch with the shape, dtype and device of all later ones.
        warmup: the number of steps that are run, and undone, before the capture. DistributedDataParallel needs 11, and
            has to be created under a stream other than the default: `with torch.cuda.stream(torch.cuda.Stream()): ...`.

    Raises:
        RuntimeError: there is no CUDA device, a tensor is on another device, or the step or the optimizer cannot be
            captured.
        TypeError: an argument has the wrong type.
        ValueError: `warmup` is below 1.
    """
    _check_arguments(model, loss_fn, optimizer, x, y)
    steps = _checked_warmup(warmup)
    _check_device(optimizer, x)
    return CapturedStep(model, loss_fn, optimizer, x, y, _CudaGraph(x.device), steps)


class _CudaGraph:
    """A CUDA graph of the GPU's work in a function."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.graph = torch.cuda.CUDAGraph()
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()  # of this graph alone, so that `end_allocation` can name it

    def warm_up(self, function: Callable[[], Any]) -> None:
        """Run the function on the stream of the capture, so that kernels, handles and workspaces exist before it."""
        with torch.cuda.device(self.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                function()
            torch.cuda.current_stream().wait_stream(self.stream)

    def capture(self, function: Callable[[], Any]) -> Any:
        """Capture the function. Every replay writes the tensors that it returns."""
        try:
            return self._record(self.graph, self.stream, self.pool, function)
        except BaseException:
            end_allocation(self.device.index, self.pool)
            # torch's random number generator leaves a failed capture only when another capture has succeeded.
            memory = torch.empty(1, device=self.device)
            self._record(torch.cuda.CUDAGraph(), torch.cuda.Stream(self.device), None, memory.zero_)
            raise

    def _record(self, graph: Any, stream: Any, pool: Any, function: Callable[[], Any]) -> Any:
        # The stream is entered here too, because torch.cuda.graph leaves it current if the capture fails. Other threads
        # may go on meanwhile ("thread_local"): a DataLoader's thread, for example, allocates pinned memory.
        recording = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        with torch.cuda.device(self.device), torch.cuda.stream(stream), recording:
            return function()

    def replay(self) -> None:
        """Replay the graph on the current stream."""
        self.graph.replay()


class CapturedStep:
    """A captured training step, from `capture_step`. Calling it replays the step.

    If the optimizer has no state yet, the first call runs without the graph and creates the state. Later calls replay.

    Attributes:
        loss: the loss of the last step. The next step overwrites it; use `loss.clone()` to keep it.
        output: the model's output in that step, for a training accuracy. The next step overwrites it too. None if it is
            not a single tensor.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
        x: Tensor,
        y: Tensor,
        graph: Any,
        warmup: int,
    ) -> None:
        self.loss: Tensor
        self.output: Tensor | None
        self.model = model
        self.loss_fn = loss_fn
        self.optimizer = optimizer
        self._graph = graph
        self._x, self._y = x.detach().clone(), y.detach().clone()
        self._kind = x.device.type
        self._autocast = torch.is_autocast_enabled(self._kind), torch.get_autocast_dtype(self._kind)
        self._training = model.training
        self._states = 0  # the number of parameters with optimizer state, once that is the graph's memory
        named = [
            (whose, f"{path}." if path else "", module)
            for whose, owner in (("the model's", model), ("loss_fn's", loss_fn))
            if isinstance(owner, nn.Module)
            for path, module in owner.named_modules()
        ]
        modules = [module for _, _, module in named]
        own = [parameter for module in modules for parameter in module._parameters.values() if parameter is not None]
        optimized = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._parameters = list({id(parameter): parameter for parameter in (*own, *optimized)}.values())
        self._rates = [
            _Rate(group, x.device) for group in optimizer.param_groups if _takes_rate_in_memory(optimizer, group)
        ]
        snapshot = _Snapshot(modules, self._parameters, optimizer, x.device)
        try:
            for _ in range(warmup):
                graph.warm_up(self._step)
            self._record_unchanging(named)
            before = dict(_leaves(optimizer.state))
            _check_state(optimizer, before, x.device)
            outside = sys.exc_info()[1]
            try:
                self.loss, self.output, *self._grads = graph.capture(self._step)
            except Exception as error:
                cause = _cause(error, outside)
                # An autograd graph that is still referenced keeps the nodes that accumulate the parameters' gradients.
                # They run on the stream on which they were created.
                if "captur" in cause:
                    cause += "; if a variable still holds a loss or an output of an earlier step, del it first"
                raise RuntimeError(f"the step cannot be captured: {cause}") from error
            for module in self._modules:
                module.drop_changed()  # a counter, for example, which the step itself changes
            self._check_unchanged("by the step itself", "a graph cannot repeat that; change it in place")
            _check_same(optimizer, before, dict(_leaves(optimizer.state)))
        finally:
            self._missing = snapshot.restore()
        self._check_unchanged("by the first step", "train one step without a graph, then capture")
        if not self._missing:
            self._states = len(optimizer.state)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Train on one batch, and return its loss, which the next call overwrites.

        Raises:
            TypeError: x or y is not a tensor.
            RuntimeError: x or y has another shape, dtype or device than in the capture; or the model or the optimizer
                was changed since then in a way that the graph cannot see.
        """
        for name, given, captured in (("x", x, self._x), ("y", y, self._y)):
            if not isinstance(given, Tensor):
                raise TypeError(f"{name} is {type(given).__name__}; it needs to be a torch.Tensor")
            if given.shape != captured.shape or given.dtype != captured.dtype or given.device != captured.device:
                raise RuntimeError(
                    f"{name} is {_described(given)}; the step was captured for {_described(captured)}: "
                    "pass such a batch, or capture another step for this one"
                )
        self._check_unchanged("since the capture", "capture the step again")
        self._x.copy_(x.detach())
        self._y.copy_(y.detach())
        for rate in self._rates:
            rate.follow()
        if self._missing:
            self._step_without_graph()
        else:
            self._graph.replay()
        for parameter, grad in zip(self._parameters, self._grads):
            parameter.grad = grad
        return self.loss

    def _step(self) -> list[Any]:
        """Run the training step. Returns the loss, the output, and the gradient of every parameter."""
        for parameter in self._parameters:
            parameter.grad = None
        enabled, dtype = self._autocast
        # Autocast caches cast weights until its outermost context ends. It must not cache weights of the graph.
        torch.clear_autocast_cache()
        with torch.enable_grad(), torch.autocast(self._kind, dtype, enabled):
            output = self.model(self._x)
            loss = self.loss_fn(output, self._y)
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss_fn returned {type(loss).__name__}; it needs to return the loss, a tensor")
        with torch.autocast(self._kind, enabled=False), contextlib.ExitStack() as rates:
            loss.backward()
            for rate in self._rates:
                rates.enter_context(rate.instead())
            self.optimizer.step()
        torch.clear_autocast_cache()
        output = output.detach() if isinstance(output, Tensor) else None
        return [loss.detach(), output, *(parameter.grad for parameter in self._parameters)]

    def _step_without_graph(self) -> None:
        """Run the step without the graph. The optimizer creates its state, which is copied into the graph's memory."""
        for memory, value in zip((self.loss, self.output, *self._grads), self._step()):
            if memory is not None and value is not None:
                memory.copy_(value)
        for path, (holder, key, value) in dict(_leaves(self.optimizer.state)).items():
            if path in self._missing:
                memory = self._missing.pop(path)
                memory.copy_(value)
                holder[key] = memory
        self._states = len(self.optimizer.state)

    def _record_unchanging(self, named: list[tuple[str, str, nn.Module]]) -> None:
        """Record everything that must not change between capture and replay.

        Args:
            named: (whose, path, module) of every module, to name its parts in errors: "the model's", "3.".
        """
        self._modules = [_Attributes(*entry) for entry in named]
        tensors = [
            (f"{whose} {path}{name}", owned, name, tensor)
            for whose, path, module in named
            for owned in (module._parameters, module._buffers)
            for name, tensor in owned.items()
        ]
        self._owned = [
            (where, owned, name, tensor, tensor.data_ptr(), tensor.requires_grad)
            for where, owned, name, tensor in tensors
            if tensor is not None
        ]
        self._absent = [(where, owned, name) for where, owned, name, tensor in tensors if tensor is None]
        self._owners = [owned for *_, module in named for owned in (module._parameters, module._buffers)]
        self._state, self._groups = self.optimizer.state, self.optimizer.param_groups
        rated = [rate.group for rate in self._rates]
        self._hyperparameters = [
            (group, name, value)
            for group in self._groups
            for name, value in group.items()
            if name != "params" and not (name == "lr" and any(group is other for other in rated))
        ]
        self._own_groups = list(self._groups)
        self._optimized = [list(group["params"]) for group in self._groups]

    def _check_unchanged(self, when: str, fix: str) -> None:
        """Raise an error if something changed that must not change between capture and replay."""

        def refuse(change: str) -> NoReturn:
            raise RuntimeError(f"{change} {when}; {fix}")

        for where, owned, name, tensor, pointer, requires_grad in self._owned:
            if owned.get(name) is not tensor or tensor.data_ptr() != pointer:
                refuse(f"{where} was removed, replaced, moved or converted")
            if tensor.requires_grad is not requires_grad:
                refuse(f"requires_grad of {where} was changed")
        for where, owned, name in self._absent:
            if owned.get(name) is not None:
                refuse(f"{where} was added")
        if self.model.training != self._training:
            mode = "train" if self._training else "eval"
            raise RuntimeError(f"the step was captured after model.{mode}(); call that, or capture another step")
        if sum(map(len, self._owners)) != len(self._owned) + len(self._absent):
            refuse("a parameter or a buffer was added or removed")
        for module in self._modules:
            if module.has_changed():
                refuse(module.change())
        optimizer = self.optimizer
        if optimizer.state is not self._state or optimizer.param_groups is not self._groups:
            refuse("the optimizer's state was loaded")
        if len(self._state) < self._states:
            refuse("the optimizer's state was removed")
        if not _same(self._groups, self._own_groups):
            refuse("a parameter group was added, removed or replaced")
        for group, parameters in zip(self._groups, self._optimized):
            if not _same(group["params"], parameters):
                refuse("the optimizer's parameters were changed")
        for group, name, value in self._hyperparameters:
            now = group.get(name)
            if now is not value and (isinstance(now, Tensor) or isinstance(value, Tensor) or now != value):
                refuse(f"the optimizer's {name} was changed from {value} to {now}")


class _Attributes:
    """The children and the mode of a module, and a library's plain attributes, such as Dropout's p, as recorded.

    A user's own attribute may be a counter that nothing on the GPU depends on.
    """

    def __init__(self, whose: str, path: str, module: nn.Module) -> None:
        self.whose, self.path, self.now = whose, path, vars(module)
        kinds = (bool, int, float, str)
        plain = {name: value for name, value in self.now.items() if type(value) in kinds and not name.startswith("_")}
        if type(module).__module__.partition(".")[0] not in ("torch", "mlp_fused"):
            plain = {"training": module.training}
        self.children = dict(module._modules)
        self._record(plain)

    def _record(self, plain: dict[str, Any]) -> None:
        self.plain = plain
        self._read = operator.itemgetter("_modules", *plain)  # one call, because every step makes it
        self._then = self._read({"_modules": self.children, **plain})

    def drop_changed(self) -> None:
        """Drop the plain attributes that have changed since the record."""
        self._record({name: value for name, value in self.plain.items() if self.now.get(name) == value})

    def has_changed(self) -> bool:
        try:
            return bool(self._read(self.now) != self._then)
        except KeyError:
            return True

    def change(self) -> str:
        """The first change, in words."""
        now = self.now["_modules"]
        for name in (*self.children, *now):
            if now.get(name) is not self.children.get(name):
                return f"{self.whose} module {self.path}{name} was added, removed or replaced"
        name = next(name for name, value in self.plain.items() if self.now.get(name) != value)
        return f"{self.whose} {self.path}{name} was changed from {self.plain[name]!r} to {self.now.get(name)!r}"


def _same(now: list[Any], then: list[Any]) -> bool:
    """True if two lists contain the same objects in the same order."""
    return len(now) == len(then) and all(map(operator.is_, now, then))


def _takes_rate_in_memory(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """True if a group's learning rate has to be copied to the graph's memory. One that is on the device need not."""
    rate = group.get("lr")
    if rate is None or (isinstance(rate, Tensor) and rate.device.type != "cpu"):
        return False
    return type(optimizer) in RATE_IN_MEMORY or (type(optimizer) is torch.optim.SGD and bool(group.get("fused")))


class _Rate:
    """The learning rate of a parameter group, in the device memory from which the graph reads it."""

    def __init__(self, group: dict[str, Any], device: torch.device) -> None:
        self.group = group
        self.value = float(group["lr"])
        self.memory = torch.tensor(self.value, device=device)

    def follow(self) -> None:
        """Copy the group's learning rate to the device, if it has changed."""
        value = float(self.group["lr"])
        if value != self.value:
            self.memory.fill_(value)
            self.value = value

    @contextlib.contextmanager
    def instead(self) -> Iterator[None]:
        """Within the block, the group's learning rate is the tensor on the device."""
        given = self.group["lr"]
        self.group["lr"] = self.memory
        try:
            yield
        finally:
            self.group["lr"] = given


def _leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, tuple[Any, Any, Any]]]:
    """Yield (path, (container, key, value)) for everything in nested dicts and lists.

    The path is the keys from the outermost container inwards. A key that is a parameter is replaced by its id.
    """
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        there = (*path, id(key) if isinstance(key, Tensor) else key)
        if isinstance(inner, dict | list):
            yield from _leaves(inner, there)
        else:
            yield there, (value, key, inner)


class _Snapshot:
    """A copy of the state that a training step changes, to restore it in place."""

    def __init__(
        self,
        modules: list[nn.Module],
        parameters: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        device: torch.device,
    ) -> None:
        self.optimizer = optimizer
        self.device = device
        self.buffers = [(module._buffers, dict(module._buffers)) for module in modules]
        self.grads = [(parameter, parameter.grad) for parameter in parameters]
        self.state = dict(_leaves(optimizer.state))
        self.parameters = set(optimizer.state)
        tensors = [*parameters, *(buffer for _, owned in self.buffers for buffer in owned.values())]
        tensors += [value for _, _, value in self.state.values()]
        self.values = [(tensor, tensor.detach().clone()) for tensor in tensors if isinstance(tensor, Tensor)]
        self.random = torch.get_rng_state()
        self.random_of_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> dict[Path, Tensor]:
        """Restore everything. Removes the tensors that the optimizer's state has gained since, and returns them."""
        gained = {
            path: value
            for path, (_, _, value) in _leaves(self.optimizer.state)
            if path not in self.state and isinstance(value, Tensor)
        }
        for parameter in list(self.optimizer.state):
            if parameter not in self.parameters:
                del self.optimizer.state[parameter]
        for path, (holder, key, _) in reversed(list(_leaves(self.optimizer.state))):
            if path not in self.state:
                del holder[key]
        for holder, key, value in self.state.values():
            holder[key] = value
        for owned, before in self.buffers:
            owned.clear()
            owned.update(before)
        for parameter, grad in self.grads:
            parameter.grad = grad
        with torch.no_grad():
            for tensor, value in self.values:
                tensor.copy_(value)
        torch.set_rng_state(self.random)
        if self.random_of_device is not None:
            torch.cuda.set_rng_state(self.random_of_device, self.device)
        return gained


def _check_arguments(model: Any, loss_fn: Any, optimizer: Any, x: Any, y: Any) -> None:
    """Check the arguments before anything runs, and without a GPU."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; it needs to be an nn.Module")
    if not callable(loss_fn):
        raise TypeError(f"loss_fn is {type(loss_fn).__name__}; it needs to be a function (output, y) -> loss")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer is {type(optimizer).__name__}; it needs to be a torch.optim.Optimizer")
    for name, tensor in (("x", x), ("y", y)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is {type(tensor).__name__}; it needs to be a torch.Tensor")
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise RuntimeError(
            f"the step of {type(optimizer).__name__} calls a closure a number of times that depends on the loss, "
            "which cannot be captured; use an optimizer whose step needs no closure"
        )
    if y.device != x.device:
        raise RuntimeError(f"y is on {y.device}, x on {x.device}; move it with y.to({str(x.device)!r})")
    modules = [module for module in (model, loss_fn) if isinstance(module, nn.Module)]
    optimized = (parameter for group in optimizer.param_groups for parameter in group["params"])
    for tensor in (*(own for module in modules for own in (*module.parameters(), *module.buffers())), *optimized):
        if tensor.device != x.device:
            raise RuntimeError(
                f"x is on {x.device}, the model's parameters on {tensor.device}; "
                f"move it with x.to({str(tensor.device)!r}), or move the model before its optimizer is created"
            )


def _checked_warmup(warmup: object) -> int:
    steps = whole_number(warmup)
    if steps is None:
        raise TypeError(f"warmup is {warmup!r}; it needs to be a number of steps, 1 or more")
    if steps < 1:
        raise ValueError(f"warmup is {steps}; it needs to be a number of steps, 1 or more")
    return steps


def _check_device(optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    """Check that the device has graphs, and that the optimizer runs in one."""
    if not x.is_cuda:
        raise RuntimeError(
            f"capture_step needs a CUDA device; x and the model are on {x.device}; "
            + ("move both with .to('cuda')" if torch.cuda.is_available() else "torch finds no CUDA device here")
        )
    if any(group.get("capturable") is False for group in optimizer.param_groups):
        name = type(optimizer).__name__
        raise RuntimeError(f"{name} has capturable=False; a graph needs {name}(..., capturable=True)")
    if DEBUG:
        raise RuntimeError("MLP_FUSED_DEBUG=1 waits for every kernel, which cannot be captured; unset it")


def _check_state(
    optimizer: torch.optim.Optimizer, state: dict[Path, tuple[Any, Any, Any]], device: torch.device
) -> None:
    """Check that all of the optimizer's state is where a graph can write it."""
    for _, key, value in state.values():
        if isinstance(value, Tensor) and value.device != device:
            raise RuntimeError(
                f"{type(optimizer).__name__} keeps {key!r} on {value.device}, where a graph cannot change it; "
                "use an optimizer that has the flag capturable, such as Adam(..., capturable=True)"
            )


def _check_same(
    optimizer: torch.optim.Optimizer,
    before: dict[Path, tuple[Any, Any, Any]],
    after: dict[Path, tuple[Any, Any, Any]],
) -> None:
    """Check that a step writes the optimizer's state in place: a replay would not change a number in Python."""
    for path in {**before, **after}:
        (_, key, old), (_, _, new) = before.get(path, (None, path[-1], None)), after.get(path, (None, None, None))
        if old is not new and (isinstance(old, Tensor) or isinstance(new, Tensor) or old != new):
            raise RuntimeError(
                f"{type(optimizer).__name__} replaces its {key!r} in every step, which a graph cannot do; "
                "use an optimizer that has the flag capturable, such as Adam(..., capturable=True)"
            )


def _cause(error: BaseException, outside: BaseException | None) -> str:
    """The first error, as text. torch raises another when a failed capture ends.

    Args:
        outside: the exception that was being handled before, if any.
    """
    while error.__context__ is not None and error.__context__ is not outside:
        error = error.__context__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}, {tensor.dtype}, on {tensor.device}"
