"""After `import switchable`, transformers opens sparse exports; without it being imported for that.

`sparse_folder.register` needs transformers (seconds to import), and `switchable --help` must not. So we register at
once where transformers is loaded already, and otherwise as soon as the one module that keeps the list of such
packages has been imported, by whatever means: an import finder that waits for that module's name, steps aside when
it comes, and calls us after it has run.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

AWAITED = "transformers.quantizers.auto"


def announce() -> None:
    """Register now or when transformers is loaded; a second call does nothing."""
    if AWAITED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _register() -> None:
    from switchable.store.sparse_folder import register

    register()


class _Waiting(MetaPathFinder):
    """Finds nothing itself; sees the awaited module go by."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002 - the signature of a finder
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        if fullname != AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    """Loads a module as its own loader does, and registers afterwards."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register()
