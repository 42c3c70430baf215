# SPDX-License-Identifier: Apache-2.0
"""One run of the demo in a process of its own: `python -m tensorpager.demo_worker JOB`, JOB being a JSON file.

A process of its own makes the peak of its memory (VmHWM) mean something. Writes facts.json and outputs.npz to the
job's directory;
for a paged run also a picture of the residency and a trace. budget_bytes 0 runs the model unpaged, the way
transformers loads it.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tensorpager.pass_plan import lru_page_ins, steps_from_events
from tensorpager.sweep import sweep_files

__all__ = ["run_job"]

PROMPT_TOKENS = 16
WARM_PASSES = 3  # the prompt, and what it takes until every pass starts the same way
PICTURE_PASSES = 4
SWEEP_BYTES = 2**30
FORWARD_PASSES = 8  # of a model that does not generate


class PassClock:
    """Notes the time and the core's counters whenever a pass has ended. A streamer for `generate`, which calls
    put()."""

    def __init__(self, core: Any) -> None:
        self._core = core
        self.times_ns: list[int] = []
        self.counters: list[dict[str, Any]] = []

    def put(self, _: object) -> None:
        self.times_ns.append(time.monotonic_ns())
        if self._core is not None:
            self.counters.append(dict(self._core.stats()))

    def end(self) -> None:
        """Nothing: the last token has been put."""

    def seconds(self) -> list[float]:
        """Seconds of each pass."""
        return [float(gap) for gap in np.diff(np.array(self.times_ns, np.int64)) / 1e9]


def run_job(job: dict[str, Any]) -> None:
    """Load, run, measure, write. job: model, output (directories), budget_bytes, tokens, engine, generate (bool)."""
    torch.set_grad_enabled(False)
    output = Path(job["output"])
    facts: dict[str, Any] = {"memory_bytes_before": _status_bytes("VmHWM"), "threads": torch.get_num_threads()}
    # Before the run and after it: a shared drive changes its pace from minute to minute.
    bandwidths = _bandwidths(job) if job["budget_bytes"] else []
    begin = time.monotonic()
    model, pager = _load(job)
    facts["load_seconds"] = time.monotonic() - begin
    core = None if pager is None else pager._core
    clock = PassClock(core)
    begin = time.monotonic()
    outputs = _generate(model, job["tokens"], clock) if job["generate"] else _forward(model, clock)
    facts["run_seconds"] = time.monotonic() - begin
    facts["pass_seconds"] = clock.seconds()
    facts["memory_bytes_max"] = _status_bytes("VmHWM")
    np.savez(output / "outputs.npz", **outputs)  # type: ignore[arg-type]  # numpy's stub takes the names for options
    if pager is not None:
        facts.update(_paging_facts(pager, clock))
        _draw(pager, clock, output, job["title"])
        pager.close()
        facts["bandwidths"] = bandwidths + _bandwidths(job)
    (output / "facts.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    msg = f"/proc/self/status has no {name}"
    raise OSError(msg)


def _load(job: dict[str, Any]) -> tuple[Any, Any]:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    name = "AutoModelForCausalLM" if job["generate"] else "AutoModel"
    if job["budget_bytes"] == 0:
        return getattr(transformers, name).from_pretrained(job["model"], dtype="auto").eval(), None
    import tensorpager

    config = transformers.AutoConfig.from_pretrained(job["model"])
    model_class = None if job["generate"] else transformers.AutoModel._model_mapping[type(config)]
    model = tensorpager.from_pretrained(
        job["model"], job["budget_bytes"], engine=job["engine"], model_class=model_class
    )
    return model, model.pager


def _prompt(vocabulary: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, vocabulary, (1, PROMPT_TOKENS), generator=generator)


def _generate(model: Any, tokens: int, clock: PassClock) -> dict[str, npt.NDArray[Any]]:
    prompt = _prompt(model.config.vocab_size)
    result = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        output_logits=True,
        return_dict_in_generate=True,
        streamer=clock,
    )
    logits = torch.cat([step.float() for step in result.logits])
    return {"tokens": result.sequences.numpy(), "values": logits.numpy()}


def _forward(model: Any, clock: PassClock) -> dict[str, npt.NDArray[Any]]:
    """The same input several times; every output counts."""
    prompt = _prompt(model.config.vocab_size)
    states = []
    clock.put(None)
    for _ in range(FORWARD_PASSES):
        states.append(model(input_ids=prompt, attention_mask=torch.ones_like(prompt)).last_hidden_state.float())
        clock.put(None)
    return {"tokens": prompt.numpy(), "values": torch.cat(states).numpy()}


def _paging_facts(pager: Any, clock: PassClock) -> dict[str, Any]:
    """Counters over the warm passes, beside what the plan promises and what LRU would have done."""
    stats = pager.stats()
    last, first = clock.counters[-1], clock.counters[min(WARM_PASSES, len(clock.counters) - 2)]
    passes = len(clock.counters) - 1 - min(WARM_PASSES, len(clock.counters) - 2)
    delta = {
        name: last[name] - first[name] for name in ("bytes_read", "page_ins", "page_accesses", "stall_ns", "faults")
    }
    events = pager._director.events
    if events is None:
        msg = f"no pass was planned: {stats['trace_failure'] or stats['plan_failure']}"
        raise RuntimeError(msg)
    core = pager._core
    steps = steps_from_events(
        events, {int(number): core.set_pages(int(number)) for number in np.unique(abs(events)) - 1}
    )
    certificate = stats["schedule"]
    accesses = certificate["accesses_per_pass"]
    return {
        "engine": stats["engine"],
        "budget_bytes": pager.budget_bytes,
        "paged_bytes": stats["paged_bytes"],
        "page_bytes": stats["page_bytes"],
        "resident_bytes_max": stats["resident_bytes_max"],
        "bytes_read": stats["bytes_read"],
        "faults": stats["faults"],
        "warm_passes": passes,
        "bytes_read_per_pass": delta["bytes_read"] / passes,
        "bytes_bound_per_pass": certificate["lower_bound_page_ins"] * stats["page_bytes"],
        "hit_rate": 1 - delta["page_ins"] / passes / accesses,
        "hit_rate_lru": 1 - lru_page_ins(steps, core.frame_count) / accesses,
        "stall_seconds_per_pass": delta["stall_ns"] / passes / 1e9,
        "faults_per_pass": delta["faults"] / passes,
        "schedule": certificate,
        "trace_failure": stats["trace_failure"],
        "plans": stats["plans"],
    }


def _draw(pager: Any, clock: PassClock, output: Path, title: str) -> None:
    """The last passes as a picture and as a trace."""
    from tensorpager._core import PAGE_STATES
    from tensorpager.timeline import residency_png

    core = pager._core
    since_ns = clock.times_ns[-min(PICTURE_PASSES + 1, len(clock.times_ns))]
    pager.trace(output / "trace.json")
    events = core.events()
    events = events[events["time_ns"] >= since_ns]
    set_ids = np.unique(events["set"][events["set"] >= 0]).tolist()
    try:
        residency_png(
            events,
            output / "residency.png",
            page_bytes=core.page_bytes,
            page_count=core.page_count,
            budget_bytes=core.budget_bytes,
            title=title,
            set_pages={set_id: core.set_pages(set_id) for set_id in set_ids},
            resident_at_end=core.page_states() == PAGE_STATES.index("device"),
        )
    except ImportError:
        (output / "residency.png").unlink(missing_ok=True)


def _bandwidths(job: dict[str, Any]) -> list[float]:
    paths = sorted(Path(job["model"]).glob("*.safetensors"))
    starts = (0.0, 1 / 3, 2 / 3)
    return [sweep_files(paths, engine=job["engine"], bytes_max=SWEEP_BYTES, start=start).bandwidth for start in starts]


if __name__ == "__main__":
    run_job(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
