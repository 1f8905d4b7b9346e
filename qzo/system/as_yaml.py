"""A file of YAML that may come from anywhere."""

from pathlib import Path
from typing import Any

import yaml


class _Plain(yaml.SafeLoader):
    """Values without anchors: a few lines of aliases to aliases stand for more than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases (*{self.peek_event().anchor}) are not read: write the value itself")
        return super().compose_node(parent, index)


def read_mapping(path: Path) -> dict[str, Any]:
    """The keys, as text, and values of a YAML file; {} of an empty one.

    ValueError for what is no YAML of plain values, has aliases, or holds no keys; OSError for a file that cannot be
    read.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Plain)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split()):.300}") from None
    except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
        # PyYAML's, for a value that does not fit its own tag, such as !!int ""
        raise ValueError(f"{path} is not YAML: a value is not what its tag says ({error!r:.100})") from None
    if content is not None and not isinstance(content, dict):
        raise ValueError(f"{path} must hold keys and values, got {type(content).__name__}")
    return {str(key): value for key, value in (content or {}).items()}
