"""A file is replaced whole or stays as it was."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from fedtune.errors import InfrastructureError


def replace(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically. Errors: InfrastructureError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise InfrastructureError(
            f"{path}: cannot be written ({error.strerror or type(error).__name__})",
            todo="check the disk and the folder's permissions",
        ) from None
