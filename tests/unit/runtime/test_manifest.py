"""A manifest's seal."""

import json

from megatron.sft.runtime.manifest import seal_holds, sealed


def test_a_manifest_holds_as_long_as_nothing_in_it_changes() -> None:
    manifest = sealed({"iteration": 3, "files": {"a": {"bytes": 1}}})
    assert seal_holds(manifest) and seal_holds(json.loads(json.dumps(manifest)))
    assert not seal_holds({**manifest, "iteration": 4})
    assert not seal_holds({name: value for name, value in manifest.items() if name != "sha256"})
