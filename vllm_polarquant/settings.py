"""What a server sets of this package, by vLLM's own means: `--additional-config '{"polarquant": {...}}'`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

SECTION = "polarquant"


def option(name: str, value: bool) -> str:
    """The JSON that `--additional-config` takes for one setting."""
    return json.dumps({SECTION: {name: value}})


@dataclass(frozen=True)
class Settings:
    """One engine's.

    centre_keys: whether a pass at start-up centres keys.
    prefill_from_pages: whether prompts attend to keys and values as they are stored, so that what a prompt
        gives does not depend on how it was cut into chunks and on what was cached.
    """

    centre_keys: bool = True
    prefill_from_pages: bool = False

    @classmethod
    def of(cls, additional_config: object) -> Settings:
        """From VllmConfig.additional_config.

        Raises:
            ValueError: for a section that is none, an unknown name in it or a value that is not true or
                false.
        """
        section: Any = {}
        if isinstance(additional_config, Mapping):
            section = additional_config.get(SECTION, {})
        names = [field.name for field in fields(cls)]
        if not isinstance(section, Mapping) or set(section) - set(names):
            raise ValueError(
                f"--additional-config: {SECTION} holds {' and '.join(names)}, nothing else; got {section!r}"
            )
        for name, wanted in section.items():
            if not isinstance(wanted, bool):
                raise ValueError(
                    f"--additional-config: {SECTION}.{name} must be true or false, got {wanted!r}"
                )
        return cls(**section)
