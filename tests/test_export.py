# SPDX-License-Identifier: Apache-2.0
"""`tensorpager export` and `verify`: what other tools load, and every damaged page named."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import safetensors.torch
import torch

import tensorpager as tp
from tensorpager import export
from tensorpager.cli import main
from tensorpager.export import export_store, verify_store
from torch_models import MIB


class Assorted(torch.nn.Module):
    """Larger and smaller than a page, several dtypes, another memory order, tied, empty, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.large = torch.nn.Linear(1024, 1100)
        self.turned = torch.nn.Conv2d(64, 32, 3).to(memory_format=torch.channels_last)
        self.small = torch.nn.Parameter(torch.randn(5, 7).bfloat16())
        self.tied = self.large.weight
        self.empty = torch.nn.Parameter(torch.empty(0, 3))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("table", torch.randn(100, 100))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.large(x)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    model = Assorted()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with tp.page(model, optimizer, budget="24MiB", store=tmp_path / "run") as pager:
        model(torch.ones(2, 1024)).square().mean().backward()
        optimizer.step()
        pager.commit()
    return tmp_path / "run"


def test_other_tools_load_what_is_exported(store: Path, tmp_path: Path) -> None:
    twin = Assorted()
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    twin(torch.ones(2, 1024)).square().mean().backward()
    optimizer.step()
    path = tmp_path / "weights.safetensors"
    out = io.StringIO()
    assert main(["export", str(store), "--output", str(path)], out) == 0
    assert out.getvalue() == f"{path}: {path.stat().st_size} bytes\n"
    assert path.stat().st_mode & 0o777 == 0o600
    loaded = safetensors.torch.load_file(path)
    expected = twin.state_dict()
    assert set(expected) - set(loaded) == {"large.weight"}  # the second name of "tied"
    assert set(loaded) <= set(expected)
    for name, tensor in loaded.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
    assert list(tmp_path.glob("*.part")) == []


def test_a_file_is_not_written_over_and_a_failure_leaves_none(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="is there already"):
        export_store(store, path)
    assert path.read_text() == "mine"
    path.unlink()
    monkeypatch.delitem(export._SAFETENSORS_NAMES, torch.bfloat16)
    with pytest.raises(tp.CheckpointError, match=r"'small' is of torch\.bfloat16"):
        export_store(store, path)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["run"]


def test_every_page_is_verified_and_a_damaged_one_is_named(store: Path, tmp_path: Path) -> None:
    out = io.StringIO()
    assert main(["verify", str(store)], out) == 0
    pages, damaged = verify_store(store)
    assert pages > 5
    assert damaged == []
    assert out.getvalue() == f"{pages} pages read, 0 damaged\n"
    seen: list[tuple[int, int]] = []
    verify_store(store, lambda done, total: seen.append((done, total)))
    assert seen == [(number + 1, pages) for number in range(pages)]

    from tensorpager._core import Pagefile

    whole = Pagefile.open([str(store)])
    stored = [page for page in range(whole.page_count) if whole.stored(page)]
    content = {page: bytes(whole.read(page)) for page in stored}
    whole.close()
    file = store / "pages.tensorpager"
    offset = next(at for at in range(2 * MIB, file.stat().st_size, 2 * MIB) if read(file, at) == content[stored[0]])
    with file.open("r+b") as handle:
        handle.seek(offset + 12345)
        byte = handle.read(1)[0]
        handle.seek(offset + 12345)
        handle.write(bytes([byte ^ 4]))
    out = io.StringIO()
    assert main(["verify", str(store)], out) == 1
    assert out.getvalue().splitlines() == [
        f"page {stored[0]} at offset {offset} of {file}: wrong checksum, these are not the bytes that were written",
        f"{pages} pages read, 1 damaged",
    ]
    with pytest.raises(tp.IoError, match="wrong checksum"):
        export_store(store, tmp_path / "weights.safetensors")
    assert not (tmp_path / "weights.safetensors").exists()


def read(file: Path, offset_bytes: int) -> bytes:
    with file.open("rb") as handle:
        handle.seek(offset_bytes)
        return handle.read(2 * MIB)


def test_what_is_no_store_is_said_to_be_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path)], io.StringIO()) == 2
    assert "holds no pagefile" in capsys.readouterr().err
    assert main(["export", str(tmp_path), "-o", str(tmp_path / "x")], io.StringIO()) == 2
    assert "holds no pagefile" in capsys.readouterr().err
