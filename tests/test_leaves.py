"""Nested batches: every kind of container and leaf reaches the device as the loader made it."""

from __future__ import annotations

import array
import collections
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_streams import LATE, Streams, equal, leaves, prefetch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from mlp_fused import DevicePrefetcher
from mlp_fused.leaves import map_leaves


class Pair(NamedTuple):
    x: Any
    y: Any


@dataclass(frozen=True)
class Record:
    x: Any
    note: str = ""
    rest: Any = field(default=None, init=False)


class Bag(collections.abc.MutableMapping[Any, Any]):
    """A mapping whose shallow copy shares the dictionary of items."""

    def __init__(self, items: Any = ()) -> None:
        self.items_ = dict(items)

    def __getitem__(self, key: Any) -> Any:
        return self.items_[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items_[key] = value

    def __delitem__(self, key: Any) -> None:
        del self.items_[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items_)

    def __len__(self) -> int:
        return len(self.items_)


class Row(collections.UserList[Any]):
    pass


def tensors() -> st.SearchStrategy[Tensor]:
    def make(kind: str, rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        whole = torch.randint(0, 100, (rows, columns), generator=generator).to(dtype)
        return {
            "contiguous": lambda: whole,
            "transposed": whole.t,
            "sliced": lambda: whole[:, ::2],
            "a view": lambda: whole[1:],
            "expanded": lambda: whole.new_ones(1, columns).expand(3, columns),
            "a number": lambda: whole.sum().to(dtype),
            "channels last": lambda: whole[None, None].to(memory_format=torch.channels_last),
        }[kind]()

    kinds = ("contiguous", "transposed", "sliced", "a view", "expanded", "a number", "channels last")
    dtypes = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64)
    return st.builds(
        make,
        st.sampled_from(kinds),
        st.integers(0, 4),
        st.integers(0, 4),
        st.sampled_from(dtypes),
        st.integers(0, 2**20),
    )


def batches() -> st.SearchStrategy[Any]:
    other = st.one_of(st.none(), st.integers(), st.text(max_size=3), st.just(range(3)), st.just(b"x"))

    def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        lists = st.lists(inner, max_size=3)
        dicts = st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
        return st.one_of(
            lists,
            lists.map(tuple),
            lists.map(Row),
            lists.map(collections.deque),
            st.builds(Pair, inner, inner),
            st.builds(Record, inner),
            dicts,
            dicts.map(collections.OrderedDict),
            dicts.map(collections.UserDict),
            dicts.map(Bag),
            dicts.map(types.MappingProxyType),
        )

    return st.recursive(st.one_of(tensors(), other), containers, max_leaves=8)


def same(actual: Any, expected: Any) -> bool:
    """True if types, keys and values are equal, and strides are those of `torch.empty_like`."""
    if isinstance(expected, Tensor):
        strides = actual.stride() == torch.empty_like(expected).stride()
        return type(actual) is type(expected) and equal(actual, expected) and strides
    if type(actual) is not type(expected):
        return False
    if isinstance(expected, collections.abc.Mapping):
        return list(actual) == list(expected) and all(same(actual[key], expected[key]) for key in expected)
    if isinstance(expected, Record):
        return same(actual.x, expected.x) and actual.note == expected.note and actual.rest is None
    if isinstance(expected, collections.abc.Sequence) and not isinstance(expected, str | bytes):
        return len(actual) == len(expected) and all(map(same, actual, expected))
    return bool(actual == expected)


@given(st.lists(batches(), max_size=5), st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_batches_arrive_as_the_loader_made_them(loader: list[Any], depth: int) -> None:
    streams = Streams(LATE["late copies"])
    prefetcher = prefetch(loader, streams, depth)
    for _ in range(2):
        count = 0
        for actual, expected in zip(prefetcher, loader, strict=True):
            streams.drain("consumer")
            assert same(actual, expected)
            assert all(streams.is_here(leaf) for leaf in leaves(actual))
            assert not any(streams.is_here(leaf) for leaf in leaves(expected)), "the loader's own batch was changed"
            count += 1
        assert count == len(loader) == len(prefetcher)


class Labelled(Pair):
    """A namedtuple whose constructor takes other arguments than its fields."""

    def __new__(cls, x: Any) -> Labelled:
        return super().__new__(cls, x, "label")


class Noted(tuple[Any, ...]):
    note = ""


class Fixed(collections.abc.Sequence[Any]):
    """A sequence that can only be created from a number."""

    def __init__(self, number: Any) -> None:
        if not isinstance(number, int):
            raise ValueError("no number")
        self.items = [torch.full((2,), float(number))]

    def __getitem__(self, index: Any) -> Any:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)


class FixedMapping(collections.abc.Mapping[str, Any]):
    """A mapping that can only be created from a number."""

    def __init__(self, number: Any) -> None:
        if not isinstance(number, int):
            raise ValueError("no number")
        self.items_ = {"x": torch.full((2,), float(number))}

    def __getitem__(self, key: str) -> Any:
        return self.items_[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.items_)

    def __len__(self) -> int:
        return len(self.items_)


def double(batch: Any) -> Any:
    return map_leaves(batch, lambda leaf: 2 * leaf)


@pytest.mark.parametrize("batch", [array.array("f", [1.0, 2.0]), collections.UserString("name")], ids=["array", "text"])
def test_arrays_and_texts_are_returned_themselves(batch: Any) -> None:
    assert double([batch, torch.ones(1)])[0] is batch


def test_a_namedtuple_with_its_own_constructor() -> None:
    doubled = double(Labelled(torch.ones(2)))
    assert type(doubled) is Labelled
    assert (doubled.x.tolist(), doubled.y) == ([2.0, 2.0], "label")


def test_a_tuple_keeps_its_attributes() -> None:
    for batch in (Noted([torch.ones(1)]), Labelled(torch.ones(1))):
        batch.note = "a note"  # type: ignore[union-attr]
        doubled = double(batch)
        assert type(doubled) is type(batch)
        assert (doubled[0].item(), doubled.note) == (2.0, "a note")


def test_containers_that_cannot_be_created() -> None:
    assert [leaf.tolist() for leaf in double(Fixed(3))] == [[6.0, 6.0]]
    assert type(double(Fixed(3))) is list
    assert type(double(FixedMapping(3))) is dict
    assert double(FixedMapping(3))["x"].tolist() == [6.0, 6.0]


def test_a_device_without_streams() -> None:
    batch = [torch.rand(3), torch.arange(2), Moves(log := []), "name"]
    (actual,) = DevicePrefetcher([batch], "meta", dtype=torch.bfloat16)
    assert [leaf.device.type for leaf in actual[:2]] == ["meta", "meta"]
    assert [leaf.dtype for leaf in actual[:2]] == [torch.bfloat16, torch.int64]
    assert log == ["to meta"]
    assert actual[3] == "name"


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", ["coo", "csr", "csc", "bsr"])
def test_sparse_tensors(layout: str) -> None:
    streams = Streams(LATE["late copies"])
    dense = torch.tensor([[0.0, 2, 0, 1], [3, 0, 0, 0]])
    block = {"blocksize": (1, 2)} if layout == "bsr" else {}
    sparse = dense.to_sparse(layout=getattr(torch, f"sparse_{layout}"), **block)
    (actual,) = prefetch([[sparse]], streams)
    streams.drain("side")
    assert actual[0].layout is sparse.layout
    assert torch.equal(actual[0].to_dense(), dense)
    parts = [actual[0]._indices(), actual[0]._values()] if layout == "coo" else [actual[0].values()]
    assert all(streams.is_here(part) for part in parts)


def test_a_packed_sequence_keeps_its_batch_sizes_on_the_host() -> None:
    streams = Streams(LATE["late copies"])
    packed = pack_padded_sequence(torch.randn(4, 2, 3), torch.tensor([2, 4]), enforce_sorted=False)
    (actual,) = prefetch([packed], streams)
    streams.drain("side")
    assert actual.batch_sizes is packed.batch_sizes
    assert streams.is_here(actual.data)
    assert torch.equal(actual.data, packed.data)
    assert torch.equal(actual.unsorted_indices, packed.unsorted_indices)


class Moves:
    """An object with a method `to`, like the batches of graph libraries."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def to(self, device: torch.device, non_blocking: bool = False) -> Moves:
        self.log.append(f"to {device}{', non_blocking' * non_blocking}")
        return self


class MovesAhead(Moves):
    def pin_memory(self) -> MovesAhead:
        self.log.append("pin_memory")
        return self

    def record_stream(self, stream: Any) -> None:
        self.log.append("record_stream")


def test_objects_that_move_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Streams, "keep", lambda _, moved, stream: moved.record_stream(stream))
    streams = Streams(LATE["late copies"])
    log: list[str] = []
    arrived = iter(prefetch([[Moves(log)], [MovesAhead(log)]], streams))
    assert isinstance(next(arrived)[0], Moves)
    assert log == ["pin_memory", "to cpu, non_blocking", "to cpu"]  # the second batch is copied ahead
    log.clear()
    assert isinstance(next(arrived)[0], MovesAhead)
    assert log == ["record_stream"]


class Marked(Tensor):
    pass


def test_tensor_subclasses_are_moved_by_their_own_to() -> None:
    streams = Streams(LATE["late copies"])
    leaf = torch.ones(2, requires_grad=True)
    batch = [leaf * 2, nn.Parameter(torch.ones(2), requires_grad=False), torch.ones(2).as_subclass(Marked)]
    (actual,) = prefetch([batch], streams)
    streams.drain("side")
    actual[0].sum().backward()
    assert torch.equal(leaf.grad, torch.full((2,), 2.0))
    assert type(actual[1]) is Tensor
    assert streams.is_here(actual[1])
    assert type(actual[2]) is Marked


@pytest.mark.gpu
@pytest.mark.usefixtures("device")
def test_nested_batches_on_a_real_gpu() -> None:
    packed = pack_padded_sequence(torch.randn(4, 2, 3), torch.tensor([4, 2]))
    sparse = torch.eye(5).to_sparse()
    batch = Record(x=[torch.randn(3, 4).t(), {"y": torch.arange(5), "empty": torch.ones(0, 3)}, packed, sparse, "name"])
    (actual,) = DevicePrefetcher([batch], "cuda")
    x, named, moved, eye, name = actual.x
    assert x.is_cuda
    assert x.stride() == batch.x[0].stride()
    assert torch.equal(x.cpu(), batch.x[0])
    assert torch.equal(named["y"].cpu(), torch.arange(5))
    assert named["empty"].shape == (0, 3)
    assert torch.equal(moved.data.cpu(), packed.data)
    assert torch.equal(eye.to_dense().cpu(), torch.eye(5))
    assert name == "name"
