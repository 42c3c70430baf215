# SPDX-License-Identifier: Apache-2.0
"""`tensorpager plan`: what it prints and writes for small configurations, and what it refuses."""

from __future__ import annotations

import io
import json
import re
import stat
from pathlib import Path
from typing import Any

import pytest

from tensorpager import plan_command
from tensorpager.budget import parse_bytes
from tensorpager.cli import main
from tensorpager.hardware import profile
from tensorpager.operator_trace import Trace
from tensorpager.planner import plan
from tensorpager.schedule import Schedule
from tensorpager.workloads import LORA_RANK, TRAINING_STATES, load_config, trace_workload

pytest.importorskip("transformers")

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "dtype": "float32",
}
PAGE = ["--page", "64KiB", "--sequence", "64"]
QUICK = [*PAGE, "--no-curve"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


def run(*arguments: str | Path) -> tuple[int, str]:
    out = io.StringIO()
    status = main(["plan", *map(str, arguments)], out)
    return status, out.getvalue()


def test_decode_in_a_third_of_the_weights(config: Path) -> None:
    status, text = run(config, *QUICK, "--budget", "3MiB", "--sequence", "64")
    trace = trace_workload(load_config(config), "decode", sequence=64)
    schedule = plan(trace, parse_bytes("3MiB"), profile(None, "gen4-nvme"), page_bytes=64 << 10)
    proof = schedule.certificate
    assert status == 0
    assert f"llama decode: weights 8.7 MiB, {len(trace.steps)} operators, 1 tokens per pass" in text
    assert "Runs paged." in text
    assert (
        f"least possible   {proof.time_bound_seconds * 1e3:.2f} ms; this plan takes {proof.time_gap:.3f} of it" in text
    )
    assert f"{proof.drive_read_bytes / 2**20:.1f} MiB read, 0 B written; {proof.bytes_gap:.3f} of the least" in text
    assert "proof            linear program, HiGHS" in text


def test_forms_of_training_state_take_their_bytes(config: Path) -> None:
    """Of a value of bfloat16: the weight, a copy, and two moments; the rest is scales, one for 256 values."""
    assert set(plan_command.STATE_CHOICES) == set(TRAINING_STATES)
    (config / "config.json").write_text(json.dumps({**LLAMA, "dtype": "bfloat16"}))
    loaded = load_config(config)
    bytes_of = {"as-weights": 6, "master": 14, "master-8bit": 8, "stochastic": 10, "stochastic-8bit": 4}
    values = 0
    for name, value_bytes in bytes_of.items():
        trace = trace_workload(loaded, "finetune", sequence=64, training_state=name)
        persistent = sum(tensor.size_bytes for tensor in trace.tensors if tensor.persistent)
        values = values or persistent // value_bytes
        assert persistent / values == pytest.approx(value_bytes, rel=0.02), name
    status, text = run(config, *QUICK, "--task", "finetune", "--training-state", "stochastic-8bit", "--budget", "8MiB")
    assert status == 0
    assert "per 1,000 passes" in text
    with pytest.raises(ValueError, match="training_state 'float8' is one of"):
        trace_workload(loaded, "finetune", training_state="float8")
    with pytest.raises(ValueError, match="is for bfloat16"):
        trace_workload(load_config(write_float32(config)), "finetune", training_state="stochastic")


def write_float32(config: Path) -> Path:
    (config / "config.json").write_text(json.dumps(LLAMA))
    return config


def test_what_fits_moves_nothing(config: Path) -> None:
    status, text = run(config, *QUICK, "--budget", "100MiB")
    assert status == 0
    assert "Fits: nothing has to move." in text


def test_what_does_not_run_says_what_would(config: Path) -> None:
    status, text = run(config, *QUICK, "--budget", "128KiB")
    assert status == 1
    found = re.search(r"Does not run: .*The smallest budget that works is (\d+) bytes", text)
    assert found is not None
    assert run(config, *QUICK, "--budget", found[1])[0] == 0
    assert run(config, *QUICK, "--budget", str(int(found[1]) - (64 << 10)))[0] == 1


def test_json_png_and_the_trace_are_written_for_their_owner(config: Path, tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("plan.json", "curve.png", "trace.json")}
    output = ["--json", files["plan.json"], "--png", files["curve.png"], "--save-trace", files["trace.json"]]
    status, text = run(config, *PAGE, "--budget", "3MiB", *output)
    assert status == 0
    for file in files.values():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    content = json.loads(files["plan.json"].read_text())
    assert Schedule.from_json(json.dumps(content["schedule"])).certificate.drive_read_bytes > 0
    sizes = [point["device_bytes"] for point in content["curve"]]
    assert sizes == sorted(sizes)
    times = [point["pass_seconds"] for point in content["curve"]]
    assert times[-1] == min(times)
    assert times[0] == max(times)
    assert files["curve.png"].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert Trace.from_json(files["trace.json"].read_text()).name == "llama decode"
    assert run(files["trace.json"], *PAGE, "--budget", "3MiB") == (0, text)


def test_json_on_stdout_is_json_alone(config: Path) -> None:
    status, text = run(config, *QUICK, "--budget", "3MiB", "--json", "-")
    assert status == 0
    assert json.loads(text)["trace"]["tokens"] == 1


def test_a_tensor_is_explained(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    status, text = run(config, *QUICK, "--budget", "3MiB", "--explain", name)
    assert status == 0
    assert f"\n{name}: 8 pages of 65536 bytes; outlives the pass.\n" in text
    assert run(config, *QUICK, "--budget", "3MiB", "--explain", "model.layers.1.mlp.up")[0] == 2
    assert (
        "tensorpager plan: no scheduled tensor is named 'model.layers.1.mlp.up'; there are" in capsys.readouterr().err
    )


def test_fine_tuning_with_choices(config: Path, tmp_path: Path) -> None:
    saved = tmp_path / "trace.json"
    arguments = ["--task", "finetune", "--sequence", "16", "--microbatches", "2", "--budget", "8MiB"]
    traced = ["--optimizer", "as traced", "--recompute", "as traced"]
    status, text = run(config, *QUICK, *arguments, *traced, "--accumulation", "vertical", "--save-trace", saved)
    assert status == 0
    assert "order of work    accumulation vertical, recompute as traced, optimizer as traced" in text
    trace = Trace.from_json(saved.read_text())
    assert trace.tokens == 32
    assert {step.phase for step in trace.steps} == {"forward", "backward", "optimizer"}
    assert max(step.microbatch for step in trace.steps) == 1


def test_checkpointing_is_in_the_trace(config: Path) -> None:
    trace = trace_workload(load_config(config), "finetune", sequence=16, checkpointing=True)
    assert "recompute" in {step.phase for step in trace.steps}


def test_adapters_leave_the_weights_alone(config: Path) -> None:
    trace = trace_workload(load_config(config), "lora", sequence=16)
    changed = {trace.tensors[number].name for step in trace.steps for number in (*step.writes, *step.overwrites)}
    weights = {tensor.name: tensor.size_bytes for tensor in trace.tensors if tensor.kind == "weight"}
    written = changed & weights.keys()
    assert {name.rsplit(".", 2)[1] for name in written} == {"down", "up"}
    assert weights["model.layers.0.self_attn.q_proj.down.weight"] == 256 * LORA_RANK * 4


def test_a_prompt_of_an_encoder_and_decoder(tmp_path: Path) -> None:
    t5 = {"model_type": "t5", "d_model": 128, "d_ff": 256, "num_layers": 2, "num_heads": 2, "vocab_size": 500}
    (tmp_path / "config.json").write_text(json.dumps({**t5, "d_kv": 64, "decoder_start_token_id": 0}))
    status, text = run(tmp_path, *QUICK, "--task", "prompt", "--sequence", "8", "--budget", "2MiB")
    assert status == 0
    assert text.startswith("t5 prompt: ")


def test_a_host_tier(config: Path) -> None:
    gpu = ["--gpu", "rtx-4090", "--host", "1GiB", "--budget", "3MiB"]
    status, text = run(config, *QUICK, *gpu)
    assert status == 0
    assert "1.0 GiB of host memory" in text
    assert "drive            0 B read, 0 B written" in text


def test_this_machine_is_measured(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(plan_command, "this_machine", lambda path: asked.append(path) or profile(None, "gen3-nvme"))
    assert run(config, *QUICK, "--budget", "3MiB", "--this-machine", str(config))[0] == 0
    assert asked == [str(config)]


def test_a_saved_machine(config: Path, tmp_path: Path) -> None:
    file = tmp_path / "machine.json"
    file.write_text(profile("rtx-3090", "gen4-nvme").to_json())
    status, text = run(config, *QUICK, "--budget", "3MiB", "--hardware", file)
    assert status == 0
    assert "\nrtx-3090" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "abacus"], "rtx-4090"),
        (["--drive", "tape"], "gen4-nvme"),
        (["--budget", "much"], "'much' is not a size"),
        (["--batch", "0"], "batch, sequence and microbatches are 1 or more"),
        (["--hardware", "/nonexistent"], "/nonexistent"),
    ],
)
def test_arguments_out_of_range(
    config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(config, *QUICK, *arguments)[0] == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no transformers configuration there"),
        ("[]", "a JSON object with a model_type"),
        ('{"model_type": 3}', "a JSON object with a model_type"),
        ('{"model_type": "abacus"}', "transformers can't use it"),
    ],
)
def test_a_configuration_that_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    (tmp_path / "config.json").write_text(content)
    assert run(tmp_path, *QUICK)[0] == 2
    assert message in capsys.readouterr().err


def test_no_configuration_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, *QUICK)[0] == 2
    assert "config.json: no transformers configuration there" in capsys.readouterr().err
