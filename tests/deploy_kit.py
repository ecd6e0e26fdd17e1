"""What test_deploy.py and test_deploy_commands.py share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
COMPOSE = ROOT / "docker-compose.yml"
DOCKERFILES = ("server/Dockerfile", "client/Dockerfile")
Compose = dict[str, Any]
Words = list[str]


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, the rest) with continued lines joined and comments left out."""
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.split(None, 1) for line in text.splitlines() if line.strip()]
    return [(word.upper(), rest) for word, rest in lines]
