# SPDX-License-Identifier: Apache-2.0
"""`page()`: move a model's parameters into a pager's address space; and `Pager`, what the user keeps of it."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

import tensorpager.addresses
import tensorpager.copies  # noqa: F401 (what the guard does with more functions)
from tensorpager.activations import Activations, Paging
from tensorpager.backward import BackwardHook
from tensorpager.budget import format_bytes, parse_bytes
from tensorpager.commit import Committer
from tensorpager.data_parallel import WrapperHook, send_paged_states_in_pieces, unwrapped
from tensorpager.device import HOST, Device, device_budget_bytes, device_number, move_buffers, refuse_inference_mode
from tensorpager.errors import ClosedError, PagedTensorError
from tensorpager.joint_commit import JointCommits, StorePlace, create_store
from tensorpager.kv_sweep import ForwardEndsHook, Sweep
from tensorpager.module_windows import ModuleWindow, is_unguarded, make_windows
from tensorpager.moving import Group, collect, move_group
from tensorpager.paged_tensor import PagedTensor, span_of
from tensorpager.passes import PassDirector, RootEnterHook, RootLeaveHook
from tensorpager.places import Places
from tensorpager.private_file import write_private
from tensorpager.quantised import QuantisedWeights
from tensorpager.ranks import agreed
from tensorpager.shards import GatheredParameters, Shard, has_shards, local_of, refuse_for_shards, shards_of
from tensorpager.spill import SpillArena, aligned_size, choose_directory
from tensorpager.store import Store
from tensorpager.training import Training, check_optimizers
from tensorpager.windows import EnterHook, EnterUnguardedHook, LeaveHook, Window, drop_abandoned_calls

if TYPE_CHECKING:
    from typing_extensions import Self

    from tensorpager._core import Pagefile, Region
    from tensorpager._core import Pager as Core
    from tensorpager.graphs import PagedGraph
    from tensorpager.kv_cache import KVCache

__all__ = [
    "Pager",
    "attach_training",
    "checked_optimizers",
    "install",
    "make_core",
    "page",
]


class Pager:
    """What pages one model. Lives as long as the model, its tensors, or a reference to it; no cycle keeps any alive.

    A context manager that closes at the end. Copies of the model (`copy.deepcopy`, pickle) are ordinary models; a
    copied Pager is None. Threads: every method from any thread.
    """

    def __init__(
        self,
        core: Core,
        director: PassDirector,
        paged_bytes: int,
        tensor_count: int,
        spilled_bytes: int,
        quantised_bytes: int,
    ) -> None:
        self._core = core
        self._director = director
        self._paged_bytes = paged_bytes
        self._tensor_count = tensor_count
        self._spilled_bytes = spilled_bytes
        self._quantised_bytes = quantised_bytes
        self._training: Training | None = None
        self._model: weakref.ref[torch.nn.Module] | None = None
        self._committer: Committer | None = None
        self._activations: Activations | None = None
        self._caches: weakref.WeakSet[KVCache] = weakref.WeakSet()
        self._sweeps: weakref.WeakSet[Sweep] = weakref.WeakSet()  # of those
        self._tells_sweeps = False
        #: What commit() was given, after resume(); None otherwise.
        self.state: Any = None

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._core.closed

    @property
    def budget_bytes(self) -> int:
        """Bytes of the frames: what may be resident at once."""
        return self._core.budget_bytes

    def stats(self) -> dict[str, Any]:
        """Counters of the core since the start or reset_stats(), and what is known about model and schedule.

        On a device (device: its number, -1 on the host), beside what follows: bytes_to_device and bytes_to_host, over
        the link; reads (pages read from the drive), host_hits (page-ins that found the page in the host tier),
        copies_out, host_budget_bytes and host_bytes_max.

        Beside the core's own (bytes_read, bytes_written, page_ins, faults, stalls, touches, resident_bytes_max, engine,
        ...): paged_tensors and paged_bytes (of the model), spill_reserved_bytes (the part of it that is in no
        checkpoint), training_bytes (of gradients, optimizer state and activations), activation_bytes and
        activation_bytes_max (of saved tensors that are paged), activations_paged and activations_kept (how many were),
        quantised_bytes (what weights that are stored_as codes take on the drive; dequantised and dequantised_on_device:
        their page-ins), hit_rate (page accesses that needed no page-in, of all), and schedule: its certificate (see
        page_schedule.PageSchedule), or None. plans:
        passes that were planned for one by one; expected_plans: plans for what many different passes have in common;
        schedule_switches: steps at which a pass left its schedule and went on with another known one;
        mispredicted_passes: of passes, those whose steps were not those of the schedule followed at their end, switched
        to or not. trace_failure and plan_failure say why there is no schedule, or None.
        """
        director = self._director
        counters: dict[str, Any] = dict(self._core.stats())
        accesses = counters["page_accesses"]
        counters["hit_rate"] = 1.0 - counters["page_ins"] / accesses if accesses else 0.0
        counters["page_bytes"] = self._core.page_bytes
        counters["device"] = self._core.device
        counters["paged_tensors"] = self._tensor_count
        counters["paged_bytes"] = self._paged_bytes
        counters["spill_reserved_bytes"] = self._spilled_bytes
        counters["quantised_bytes"] = self._quantised_bytes
        counters["training_bytes"] = 0 if self._training is None else self._training.size_bytes
        activations = self._activations
        counters["activation_bytes"] = 0 if activations is None else activations.paged_bytes
        counters["activation_bytes_max"] = 0 if activations is None else activations.paged_bytes_max
        counters["activations_paged"] = 0 if activations is None else activations.paged_count
        counters["activations_kept"] = 0 if activations is None else activations.kept_count
        counters["plans"] = director.plan_count
        counters["expected_plans"] = director.expected_plan_count
        counters["mispredicted_passes"] = director.mispredicted_pass_count
        counters["trace_failure"] = director.trace_failure
        counters["plan_failure"] = director.plan_failure
        counters["schedule"] = self._certificate()
        return counters

    def _train(self, training: Training) -> None:
        training.begin(self._director)
        self._director.trains = True
        self._director.before_tracing = training.updates.settle
        self._training = training
        model = None if self._model is None else self._model()
        if model is not None:
            model.register_forward_pre_hook(WrapperHook(training, with_shards=has_shards(model)))

    def _commit_with(self, joint: JointCommits | None) -> None:
        assert self._committer is not None
        self._committer.joint = joint

    def add_optimizer(self, optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]) -> None:
        """Train a model that is paged already, such as one of from_pretrained(): page gradients and state from now on.

        optimizer: of torch.optim, one or several, made over the paged model's parameters; as for page(). Without a
        store. The checkpoint stays as it is: weights that are trained go to spill. PagedTensorError when the model is
        trained already, and as page() does; TypeError; ClosedError.
        """
        model = None if self._model is None else self._model()
        if self._training is not None or model is None:
            msg = "this model's gradients and optimizer state are paged already; give page() all of its optimizers"
            raise PagedTensorError(msg)
        if self.closed:
            msg = "the pager is closed: its model can't be trained"
            raise ClosedError(msg)
        optimizers = checked_optimizers(optimizer, None if self._core.device < 0 else self._core.device)
        refuse_for_shards(optimizers if has_shards(model) else ())
        training = Training(self._core, optimizers)
        for parameter in model.parameters():
            if isinstance(local_of(parameter), PagedTensor):
                training.placed(parameter)
        self._train(training)

    @property
    def updates_wait(self) -> bool:
        """Whether the optimizer's step() leaves each update for the next use of its parameters, as it does at first.

        Then its transfers run beside what forward computes (`updates.py`). Whatever reads a parameter, its gradient or
        the optimizer's state by way of torch gets the new values, but not a raw pointer that was taken before step();
        set it to False where there are such. What waits is updated then. PagedTensorError without an optimizer.
        """
        return self._training is not None and self._training.updates.may_wait

    @updates_wait.setter
    def updates_wait(self, may_wait: bool) -> None:
        if self._training is None:
            msg = "this model is not trained by its pager, so no update waits: page(model, optimizer) does that"
            raise PagedTensorError(msg)
        self._training.updates.may_wait = may_wait
        if not may_wait:
            self._training.updates.settle()

    def activations(self) -> Paging:
        """A context manager in which what autograd saves for backward is paged too, where it does not fit.

            with pager.activations():
                loss = model(x).square().mean()
            loss.backward()  # inside or after

        Saved tensors of 64 KiB and more stay plain while they are a quarter of the budget at most, beside it; beyond,
        those saved first are paged, and come back in the reverse order. So a model whose activations fit pays nothing.
        Weights, and what is in the address space already, are saved as ever. Gradients are the same, bit for bit; it
        goes with torch.utils.checkpoint, autocast and accumulation. PagedTensorError on a device; ClosedError.
        """
        if self._activations is None:
            places = self._training.places if self._training is not None else activation_places(self._core)
            model = None if self._model is None else self._model()
            self._activations = Activations(self._core, places, () if model is None else GatheredParameters(model))
        return Paging(self._core, self._activations)

    def capture(
        self,
        function: Callable[..., Any],
        *args: Any,
        warmup: int = 2,
        piece_bytes: int | str | None = None,
        gates: bool = False,
        **kwargs: Any,
    ) -> PagedGraph:
        """Capture a function of a model on a device as CUDA graphs that are replayed with paging underneath.

            step = pager.capture(lambda ids: model(ids).argmax(-1), ids)
            for _ in range(100):
                ids = step(ids).clone()

        The function runs `warmup` times with copies of the arguments, so what it changes (a KV cache) it changes, and
        once more without anything being run. Everything that holds for torch.cuda.graph holds for it: the same shapes,
        control flow, and memory each time, and nothing that waits for the device. Gradients are off. Tensors among the
        arguments are inputs, copied for each call; other arguments, and what is inside of them, stay as they are.

        piece_bytes: how much of the budget is held at once at most, as bytes or a text such as "64MiB"; by default a
        16th, or all that the function uses if the budget holds it. Steps that fit together are one graph. A single
        step may need more.

        gates: make one graph of all, which waits for its pages on the device, instead of one for each piece. It is
        refused, with EngineError and the reason, where this device and stream would not get on meanwhile, and has to be
        replayed in the stream that is current now. A page that can't be read then costs the CUDA context, since a graph
        can't be stopped.

        Raises PagedTensorError on the host and inside of a call of the model; BudgetError, IoError, DeviceError; what
        the function and torch raise; ClosedError.
        """
        from tensorpager import graphs

        if self.closed:
            msg = "the pager is closed: its model can't be captured"
            raise ClosedError(msg)
        held_bytes = 0 if piece_bytes is None else parse_bytes(piece_bytes)
        return graphs.capture(
            self._core, self._director, function, args, kwargs, warmup=warmup, piece_bytes=held_bytes, gates=gates
        )

    def commit(self, state: object = None) -> int:
        """Make all of training as it is now the store's next commit. Returns its number.

        Parameters, gradients, buffers, optimizer state and options, and the random states of torch (CPU), Python and
        NumPy are in it; so is `state`, for what else resume() is to bring back: None, bools, numbers, strings, bytes,
        small tensors, and lists, tuples and dicts of these, such as a scheduler's state_dict() and a position in the
        data. Call it between steps, best after zero_grad(): gradients that nobody refers to need not be written.

        Blocks until it is on the drive; until then the commit before is what resume() finds. Only pages that changed
        are written. Nobody may write to the model meanwhile. Raises IoError (the last commit is whole, and nothing in
        memory is lost); PagedTensorError without a store; TypeError for a state that can't be kept; ClosedError.

        In a process group all ranks call it, each with a state of its own, and all have the commit or none has: when
        one fails the others raise RanksError, and training can go on from what is in memory. RanksError too when a rank
        is gone; then it may be undecided which commit is the last one, until resume().
        """
        if self._committer is None:
            msg = "commit() needs a store and an optimizer: page(model, optimizer, store=directory)"
            raise PagedTensorError(msg)
        return self._committer.commit(state)

    def _attach_cache(self, cache: KVCache, sweep: Sweep) -> None:
        """The cache ends with the pager, and its sweep is told when a forward of the model ends."""
        model = None if self._model is None else self._model()
        if model is not None and not self._tells_sweeps:
            self._tells_sweeps = True
            model.register_forward_hook(ForwardEndsHook(self._sweeps), always_call=True)
        self._caches.add(cache)
        self._sweeps.add(sweep)

    def _certificate(self) -> dict[str, int | float] | None:
        schedule = self._director.schedule
        if schedule is None:
            return None
        return {
            "steps": len(schedule.step_set),
            "page_ins_per_pass": schedule.page_ins_per_pass,
            "lower_bound_page_ins": schedule.lower_bound_page_ins,
            "moved_pages_per_pass": schedule.moved_pages_per_pass,
            "lower_bound_moved_pages": schedule.lower_bound_moved_pages,
            "hits_per_pass": schedule.hits_per_pass,
            "accesses_per_pass": schedule.accesses_per_pass,
            "working_set_pages": schedule.working_set_pages,
            "largest_step_pages": schedule.largest_step_pages,
            "frame_count": schedule.frame_count,
        }

    def reset_stats(self) -> None:
        """Set the counters to zero, the high-water marks to what is resident now."""
        self._core.reset_stats()

    def trace(self, path: str | os.PathLike[str] | None = None) -> npt.NDArray[np.void]:
        """The last events, oldest first; given a path, also written there for Perfetto.

        The file is JSON in Chrome's trace format, mode 0600. Fields of an event: time_ns, kind (index
        into `_core.EVENT_KINDS`), page, frame, step, set, thread.
        """
        events = self._core.events()
        if path is not None:
            from tensorpager.timeline import chrome_trace

            names = {
                int(number): self._core.set_name(int(number)) for number in np.unique(events["set"]) if number >= 0
            }
            content = chrome_trace(events, page_bytes=self._core.page_bytes, set_names=names)
            write_private(path, json.dumps(content))
        return events

    def close(self) -> None:
        """Stop paging: drain transfers and free frames and spill. Any later use of the model raises ClosedError.

        Waits for transfers in flight. Idempotent. Modified weights that were not saved are lost.
        """
        drop_abandoned_calls()  # or the guard might still be off, and what follows would crash instead of raising
        if self._training is not None:
            self._training.updates.drop()
        for cache in list(self._caches):
            cache.close()
        self._core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self._core.stats()['engine']} engine"
        return (
            f"Pager({self._tensor_count} tensors, {format_bytes(self._paged_bytes)} in a budget of "
            f"{format_bytes(self.budget_bytes)}, {state})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _no_pager, ()


def _no_pager() -> None:
    return None


def activation_places(core: Core) -> Places:
    """For a model without an optimizer."""
    return Places(core, SpillArena(core), Window(core, -1, "activations"))


def make_core(
    budget: int | str,
    store: str | os.PathLike[str] | None,
    engine: str,
    page_bytes: int = 0,
    device: Device = None,
    host_budget: int | str | None = None,
    pagefile: Pagefile | None = None,
) -> Core:
    """A core with all frames of the budgets. `pagefile`: taken over, and `store` means nothing then.

    BudgetError, MemoryMapError, EngineError, DeviceError, PagedTensorError, IoError, ValueError.
    """
    from tensorpager._core import Pager as NativePager

    number = device_number(device)
    refuse_inference_mode(number)
    if number == HOST and host_budget is not None:
        msg = "host_budget= is for the tier beneath a device; on the host, budget= is all there is"
        raise ValueError(msg)
    return NativePager(
        budget_bytes=device_budget_bytes(budget, number),
        page_bytes=page_bytes,
        engine=engine,
        spill_directory="" if pagefile is not None else choose_directory(store),
        pagefile=pagefile,
        device=number,
        host_budget_bytes=0 if host_budget is None else parse_bytes(host_budget),
    )


def page(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    *,
    budget: int | str = "1GiB",
    store: Store | None = None,
    engine: str = "auto",
    page_bytes: int = 0,
    device: Device = None,
    host_budget: int | str | None = None,
    stored_as: str | None = None,
) -> Pager:
    """Page the parameters of a model: from now on `budget` bytes of them are resident, the rest is on disk.

    optimizer: of torch.optim, over parameters of the model; one, or several. Then gradients and optimizer state are
    paged too, and training needs no more RAM than the budget, activations, and one gradient at a time; the trained
    weights are the same, bit for bit. step() updates as many parameters at a time as half of the budget holds.

    store, with an optimizer: the directory, made if it is not there, or directories, whose drives share the pages, in
    which training survives. pager.commit() makes all that is trained durable there, and resume() goes on from the last
    commit; the first is made here. A directory that has a commit is refused. Without an optimizer: the directory for
    the spill file, which has no name and is gone when the process ends; by default the first of $TMPDIR, /var/tmp and
    the working directory that is on a disk.

    budget: bytes, or a text such as "1GiB". engine: "auto", "uring" or "pread". page_bytes: 0, or a power of two from
    2 MiB to 64 MiB.

    device: None for RAM, or a CUDA device ("cuda", "cuda:1", 1). Then the budget is of its memory, "auto" for what it
    has free less a reserve for torch (`device.AUTO_RESERVE_SHARE`), and host_budget (1 GiB by default) is RAM,
    page-locked, that pages pass through and stay in as long as there is room. The model is given on the CPU; its
    parameters and buffers are on the device afterwards. For inference so far: a pass with gradients is refused.

    stored_as: "int8", "float8_e4m3fn" or "float8_e5m2" to keep large bfloat16 and float16 weights on the drive as such
    codes, with a float32 scale for each 128 of them: about half the bytes are read, for weights that differ from the
    given ones by up to 0.4 %, 6 % or 12 % of the largest of their block. Embeddings, biases and what is smaller than a
    page stay exact. The model computes in its own dtype. On a device a kernel makes the numbers as they arrive.

    The parameters become PagedTensors at the same places in the model; each original is freed once it is copied, so
    the peak is the model plus the budget. Tied and overlapping parameters stay so. Buffers stay in RAM. An optimizer
    that is not given here has to be made afterwards (it would keep the originals), and keeps its state in RAM unless it
    is given to Pager.add_optimizer().

    Raises BudgetError, before anything is changed, when one module's parameters don't fit, but for what operators bring
    in part by part: weights of nn.Linear, tables of nn.Embedding (compute_ops.py); PagedTensorError for a parameter
    that can't be paged (not on the CPU, sparse, quantized, on the meta device, with hooks, already paged), for an
    optimizer whose step can't be taken some parameters at a time, and when no weight can be stored_as is asked for;
    TypeError for what is no optimizer; IoError, EngineError, DeviceError, MemoryMapError, ValueError.

    In a process group of torch.distributed every rank calls it, and pages what it has of the model: its shards when
    fully_shard() has sharded it before, or all of it in DistributedDataParallel, wrapped before or after. With a store,
    ranks have one each, in directories rank-0-of-2 and so on in the one that is named; their commits are made together.
    RanksError when it fails on another rank, or the store is of other ranks.
    """
    optimizers = checked_optimizers(optimizer, device)
    options = _Options(budget, engine, page_bytes, device, host_budget, stored_as)
    with unwrapped(model) as inner:
        if optimizers and store is not None:
            return _page_in_store(inner, optimizers, options, StorePlace(store, "page()"))
        return _page_in(inner, optimizers, options, None, _one_directory(store))


@dataclass(frozen=True)
class _Options:
    """Of page(), as given."""

    budget: int | str
    engine: str
    page_bytes: int
    device: Device
    host_budget: int | str | None
    stored_as: str | None


def _page_in_store(
    model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], options: _Options, place: StorePlace
) -> Pager:
    if options.stored_as is not None:
        msg = "weights that are stored_as codes end with the process, so they can't be trained in a store"
        raise PagedTensorError(msg)
    from tensorpager._core import choose_host_page_bytes

    agreed(place.ranks, "page()", lambda: _pageable(model, optimizers))  # before a store is made
    page_bytes = options.page_bytes or choose_host_page_bytes(parse_bytes(options.budget))
    pagefile = create_store(place, page_bytes, "page()")
    pager = agreed(
        place.ranks, "page()", lambda: _page_in(model, optimizers, options, pagefile, None), lambda each: each.close()
    )
    try:
        pager._commit_with(None if place.ranks is None else JointCommits(place.ranks, None))
        pager.commit()
    except BaseException:
        pager.close()
        raise
    return pager


def _pageable(model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]) -> tuple[list[Shard], list[Group]]:
    shards = shards_of(model)
    refuse_for_shards(optimizers if shards else ())
    return shards, collect(model, shards)


def _page_in(
    model: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    options: _Options,
    pagefile: Pagefile | None,
    spill: str | os.PathLike[str] | None,
) -> Pager:
    try:
        shards, groups = _pageable(model, optimizers)
        page_bytes = options.page_bytes if pagefile is None else pagefile.page_bytes
        core = make_core(
            options.budget, spill, options.engine, page_bytes, options.device, options.host_budget, pagefile
        )
    except BaseException:
        if pagefile is not None:
            pagefile.close()
        raise
    try:
        weights = None if options.stored_as is None else QuantisedWeights(core, spill, options.stored_as)
        return _page(model, core, groups, shards, optimizers, weights, durable=pagefile is not None)
    except BaseException:
        core.close()
        raise


def _page(
    model: torch.nn.Module,
    core: Core,
    groups: list[Group],
    shards: list[Shard],
    optimizers: list[torch.optim.Optimizer],
    weights: QuantisedWeights | None,
    *,
    durable: bool,
) -> Pager:
    quantised_bytes = 0 if weights is None else _place_quantised(groups, weights)
    regions: list[Region] = []
    arena = SpillArena(core, regions)
    exact = [group for group in groups if group.address is None]
    arena.reserve(sum(aligned_size(size_bytes) for size_bytes in _sizes(exact, shards)))
    _give_addresses(exact, arena)
    windows = make_windows(model, core, _spans_of(groups))
    del exact  # or the originals would stay
    paged_bytes = sum(_sizes(groups, shards))
    tensor_count = len(shards)
    training = Training(core, optimizers, regions) if optimizers else None
    for shard in shards:
        if not shard.is_empty:
            shard.move(core, arena.place(shard.size_bytes))
        if training is not None:
            training.placed(shard.parameter)
    while groups:
        tensor_count += move_group(core, groups.pop(0), _ignore_moved if training is None else training.moved)
    pager = _attach(model, core, windows, paged_bytes, tensor_count, arena.size_bytes, quantised_bytes)
    if training is not None:
        pager._train(training)
    if training is not None and durable:
        pager._committer = Committer(core, model, training, regions)
    return pager


def _sizes(groups: list[Group], shards: list[Shard]) -> list[int]:
    return [group.size_bytes for group in groups] + [shard.size_bytes for shard in shards]


def _give_addresses(groups: list[Group], arena: SpillArena) -> None:
    for group in groups:
        group.address = arena.place(group.size_bytes)


def _spans_of(groups: list[Group]) -> dict[int, tuple[int, int]]:
    spans = {}
    for group in groups:
        assert group.address is not None
        for slot in group.slots:
            spans[id(slot.parameter)] = (group.address + slot.offset_bytes, slot.size_bytes)
    return spans


def attach_training(
    model: torch.nn.Module,
    core: Core,
    windows: list[ModuleWindow],
    paged_bytes: int,
    tensor_count: int,
    training: Training,
    regions: list[Region],
) -> Pager:
    """Hook up a model whose training state is paged by `core`, which has a pagefile, already."""
    pager = _attach(model, core, windows, paged_bytes, tensor_count, paged_bytes, 0)
    pager._train(training)
    pager._committer = Committer(core, model, training, regions)
    return pager


def _one_directory(store: Store | None) -> str | os.PathLike[str] | None:
    if store is None or isinstance(store, (str, os.PathLike)):
        return store
    msg = "several directories are for a store, which keeps what an optimizer trains; spill goes to one"
    raise ValueError(msg)


def checked_optimizers(optimizers: object, device: Device) -> list[torch.optim.Optimizer]:
    """As a list. PagedTensorError, TypeError as for page()."""
    if optimizers is None:
        return []
    given: list[Any] = list(optimizers) if isinstance(optimizers, (list, tuple)) else [optimizers]
    check_optimizers(given)
    if device_number(device) != HOST:
        msg = "on a device only inference works so far: page the model there without its optimizer, or on the host"
        raise PagedTensorError(msg)
    return given


def _ignore_moved(_original: torch.nn.Parameter, _paged: PagedTensor) -> None:
    pass


def _place_quantised(groups: list[Group], weights: QuantisedWeights) -> int:
    """Write the groups that can be stored as codes, and give them addresses. Returns the bytes on the drive."""
    for group in groups:
        slot = group.slots[0]
        if len(group.slots) == 1 and weights.takes(slot.parameter, [owner for owner, _ in slot.owners]):
            weights.write(id(group), slot.name, slot.parameter)
    weights.map()
    for group in groups:
        group.address = weights.address(id(group))
        group.written = group.address is not None
    return weights.size_bytes


def install(model: torch.nn.Module, core: Core, spilled_bytes: int, quantised_bytes: int = 0) -> Pager:
    """Hook up a model whose parameters are paged by `core` already. BudgetError as for page()."""
    paged = {id(parameter): parameter for parameter in model.parameters() if isinstance(parameter, PagedTensor)}
    spans = {key: span_of(parameter) for key, parameter in paged.items()}
    windows = make_windows(model, core, spans)
    paged_bytes = sum(size_bytes for _, size_bytes in set(spans.values()))
    return _attach(model, core, windows, paged_bytes, len(paged), spilled_bytes, quantised_bytes)


# -- windows -----------------------------------------------------------------------------------------------------------


def _attach(
    model: torch.nn.Module,
    core: Core,
    windows: list[ModuleWindow],
    paged_bytes: int,
    tensor_count: int,
    spilled_bytes: int,
    quantised_bytes: int,
) -> Pager:
    """Register the hooks. The root's come first on the way in and last on the way out."""
    move_buffers(model, core)
    send_paged_states_in_pieces()
    director = PassDirector(core)
    model.register_forward_pre_hook(RootEnterHook(director), prepend=True, with_kwargs=True)
    entered: dict[int, torch.nn.Module] = {}
    for module in model.modules():
        if is_unguarded(module):
            module.register_forward_pre_hook(EnterUnguardedHook())
            entered[id(module)] = module
    for item in windows:
        item.module.register_forward_pre_hook(EnterHook(item.window))
        entered[id(item.module)] = item.module
        held: list[PagedTensor] = []
        for parameter in (owner._parameters[name] for owner, name in item.owned):
            if isinstance(parameter, PagedTensor) and parameter._tp_backing is not None:
                parameter._tp_backing.windows.append(item.window)
                held.append(parameter)
        if core.device == HOST:
            item.module.register_forward_hook(BackwardHook(item.window, held))
    for module in entered.values():
        module.register_forward_hook(LeaveHook(), always_call=True)
    model.register_forward_hook(RootLeaveHook(director), always_call=True)
    core.reset_stats()  # the counters tell of the model's runs, not of moving it in
    pager = Pager(core, director, paged_bytes, tensor_count, spilled_bytes, quantised_bytes)
    pager._model = weakref.ref(model)
    return pager
