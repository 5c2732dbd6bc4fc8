"""torch, imported when first used.

Checking a recipe or printing ``--help`` needs the methods' parameter models but no tensor; importing torch
would make both take seconds. A method file says ``from mergekit_lr.lazy import torch``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
else:

    class _Torch:
        def __getattr__(self, name: str) -> Any:
            import torch

            value = getattr(torch, name)
            setattr(self, name, value)  # the next access is a plain attribute
            return value

    torch = _Torch()
