"""Our version, and those of the libraries that compute."""

from __future__ import annotations

__version__ = "0.2.0"


def versions() -> dict[str, str]:
    """Return the versions of what computes, by package: switchable, torch and transformers."""
    import torch
    import transformers  # seconds to import, and `switchable --version` needs neither

    ours = {"switchable": __version__, "torch": str(torch.__version__)}
    return ours | {"transformers": transformers.__version__}
