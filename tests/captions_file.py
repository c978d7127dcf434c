"""A kind of data file that only the tests know."""

from __future__ import annotations

from vlm.errors import RecordError
from vlm.files import sha256


class Lines:
    """A text file of `image<tab>caption` lines without a header."""

    def __init__(self, path, name):
        self.path, self.name = path, name or path.name
        self.lines = path.read_text().splitlines()

    def __len__(self):
        return len(self.lines)

    def __getitem__(self, number):
        image, _, caption = self.lines[number].partition("\t")
        if not caption:
            raise RecordError("caption_missing", "a line without a tab")
        return {"image": image, "caption": caption}

    def where(self, number):
        return f"{self.name}: line {number + 1}"

    def fingerprint(self):
        return str(self.path.stat().st_mtime_ns)

    def content_digest(self):
        return sha256(self.path)
