"""Files as somebody makes them who knows the format: changed by hand, with a digest that is right again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from se_inject.records import compute_digest

Content = dict[str, Any]


def forge(path: Path, change: Callable[[Content], object], *, target: Path | None = None) -> None:
    """Change what a `.pt` file holds; the digest follows, as far as what is left has one."""
    content = torch.load(path, weights_only=True)
    change(content)
    if isinstance(content.get("state_dict"), dict) and "digest" in content:
        values = {key: value for key, value in content.items() if key not in ("digest", "state_dict")}
        content["digest"] = compute_digest(content["state_dict"], values)
    torch.save(content, target or path)
