"""A sparse export in plain transformers: told `trust_remote_code=True`, its Auto classes open it in sparse mode.

`config.json` names for the Auto class a class in a file beside it, `auto_map`, which is transformers' way for models
with code of their own. That file gets the class from here. Without the word transformers opens the plain dense model.

Flow: `store/export.py` writes the file -> `pipeline`, lm-eval, `transformers serve`, ... -> here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers.utils import cached_file

from switchable.errors import InputError
from switchable.ffn.convert import set_mode
from switchable.store.contents import ROUTERS
from switchable.store.experts import restore_experts


def sparse_class(name: str) -> type:
    """Return a class whose `from_pretrained` gives transformers' model of that name, switchable and in sparse mode.

    Its settings are transformers' own. It raises InputError where the experts are damaged or another model's.
    """
    plain = getattr(transformers, name)

    def from_pretrained(_cls: type, folder: str, *args: Any, **settings: Any) -> Any:
        model = plain.from_pretrained(folder, *args, **settings)
        vars(model.config).pop("auto_map", None)  # what the model saves has no such file beside it
        routers = cached_file(folder, ROUTERS)  # of a folder, or of a repository of the Hub
        if routers is None or not restore_experts(Path(routers).parent, model):
            raise InputError(f"{folder} holds no experts; write it again with switchable export --to sparse")
        model.eval()
        set_mode(model, "sparse")
        return model

    return type(name, (plain,), {"from_pretrained": classmethod(from_pretrained)})
