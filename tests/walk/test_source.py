"""Reading a model's files, where the command line's own tests (test_bad_input.py) cannot make the case."""

from pathlib import Path
from typing import Any

import pytest

from sordino.errors import InputError
from sordino.walk import source
from tiny import make_tiny


def test_a_file_too_large_to_be_mapped_is_the_users_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny(tmp_path / "model")

    def no_memory(*_: Any, **__: Any) -> None:
        raise RuntimeError("unable to mmap 137953388736 bytes from file <model.safetensors>: Cannot allocate memory (12)")

    monkeypatch.setattr(source, "safe_open", no_memory)
    with pytest.raises(InputError, match=r"cannot be opened: unable to mmap .* smaller shards"):
        source.open_source(str(model))
