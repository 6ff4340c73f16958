"""Writes a BentoML model into a given store folder: the only use of BentoML's private modules.

BentoML's public calls write into the store of BENTOML_HOME alone, file after file: a killed import would leave half a
model there. tests/test_private_parts.py fails when an upgrade of BentoML moves what is used here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_model(
    store: Path, tag: str, files: Mapping[str, bytes], labels: Mapping[str, str], metadata: Mapping[str, Any]
) -> None:
    """Make a model, its ``model.yaml`` and the store's ``latest`` in a folder that is a store of BentoML's.

    Parameters
    ----------
    store : Path
        An existing folder.
    tag : str
        ``name:version``.
    files : mapping of str to bytes
    labels, metadata : mapping
        Shown by ``bentoml models get``.
    """
    # bentoml takes over a second to import, and a bundle that the store holds already needs none of it
    import bentoml
    from bentoml._internal.models import ModelStore

    with bentoml.models.create(
        tag,
        labels=dict(labels),
        metadata=dict(metadata),
        context=bentoml.models.ModelContext(framework_name="fraud-bento", framework_versions={}),
        _model_store=ModelStore(store),
    ) as model:
        for name, content in files.items():
            Path(model.path_of(name)).write_bytes(content)
