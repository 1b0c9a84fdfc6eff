"""responses"""

from typing import Any

from .contract import Job, Server


def parse(body: dict[str, Any], server: Server) -> Job:
    raise NotImplementedError
