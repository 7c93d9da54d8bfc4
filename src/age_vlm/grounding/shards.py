"""The folder of a grounding run: a manifest, and shards each of which is there whole or not at all.

A shard is two files: `phrases/<name>.jsonl`, what became of each phrase, and `data/<name>.parquet`, the samples. The second
one is put in place last, so a shard is done when it is there, whenever the run was killed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..atomic_files import replaced, unfinished
from ..errors import UserError
from ..settings import flattened


_MANIFEST = "manifest.json"
REPORT = "report.html"


class ShardFolder:
    """
    Args:
        folder: is made where it does not exist.
        manifest: what decides the content: data, teacher, settings, and `shards`, their number.
    """

    def __init__(self, folder: str | Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = Path(folder), manifest
        self.shards: int = manifest["shards"]

    def claim(self) -> None:
        """Begin the run, or continue the same one: clear away what a killed one left unfinished.

        Raises:
            UserError: the folder holds something else, or a run with other data, teacher or settings.
        """
        path = self.folder / _MANIFEST
        if path.exists():
            self._compare(path)
        elif self.folder.exists() and (not self.folder.is_dir() or self._holds_other_things()):
            raise UserError(
                f"output: '{self.folder}' is not a folder of `age-vlm ground`, expected one, or a new name."
            )
        for part in (self.folder / "data", self.folder / "phrases"):
            part.mkdir(parents=True, exist_ok=True)
        self._clear()
        if not path.exists():
            with replaced(path) as file:
                file.write(f"{json.dumps(self.manifest, indent=2)}\n".encode())

    def _holds_other_things(self) -> bool:
        # A run that was killed before it wrote its manifest leaves these.
        left = {self.folder / "data", self.folder / "phrases", *unfinished(self.folder, [_MANIFEST])}
        return any(path not in left or (path.is_dir() and any(path.iterdir())) for path in self.folder.iterdir())

    def _clear(self) -> None:
        paths = [self.folder / _MANIFEST, self.folder / REPORT]
        paths += [path(shard) for path in (self.samples, self.phrases) for shard in range(self.shards)]
        names = {path.name for path in paths}
        for folder in {path.parent for path in paths}:
            for part in unfinished(folder, names):
                part.unlink(missing_ok=True)

    def _compare(self, path: Path) -> None:
        try:
            there = flattened(json.loads(path.read_text("utf-8")))
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):
            raise UserError(f"output: '{path}' is damaged, expected the manifest of an earlier run.") from None
        here = flattened(self.manifest)
        for name in here.keys() | there.keys():
            if here.get(name) != there.get(name):
                raise UserError(
                    f"output: '{self.folder}' holds a run with {name} {there.get(name, 'not set')!r}, this one has "
                    f"{here.get(name, 'not set')!r}, expected the same, or another folder."
                )

    def name(self, shard: int) -> str:
        # The form in which the Hub and `load_dataset` expect the parts of a split.
        return f"train-{shard:05d}-of-{self.shards:05d}"

    def samples(self, shard: int) -> Path:
        return self.folder / "data" / f"{self.name(shard)}.parquet"

    def phrases(self, shard: int) -> Path:
        return self.folder / "phrases" / f"{self.name(shard)}.jsonl"

    def missing(self) -> list[int]:
        """Numbers of the shards that are still to be made."""
        return [shard for shard in range(self.shards) if not self.samples(shard).exists()]

    def records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Number of the shard, and record, of all phrases and left out samples, in order."""
        for shard in range(self.shards):
            with open(self.phrases(shard), encoding="utf-8") as file:
                yield from ((shard, json.loads(line)) for line in file)
