"""How docstrings of this house read on the site: its named lines in bold, its examples as code."""

import re

import griffe

NAMED = ("Fields", "Paper", "Differs from the paper", "May import")


class House(griffe.Extension):
    """Before a docstring is parsed: `Example:` is what Google's style calls `Examples:`."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """One object, whatever it is."""
        if obj.docstring:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(rf"\b({'|'.join(NAMED)}):(?= )", r"**\1:**", text)
