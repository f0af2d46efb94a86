"""WikiText (Merity et al. 1609.07843): the hub stores one line per row, and articles are joined from the lines.

An article begins at its title, ` = Title = `; headings inside it have more signs (` = = Section = = `). Empty rows
stand for the lines ` ` of the original files, so that the articles laid end to end are those files, byte for byte.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from mupsweep.data.sources.hub import Hub
from mupsweep.errors import DataError

TITLE = re.compile(r" = (?!= )[^\n]*(?<! =) = \n?")
EMPTY_LINE = " \n"


class WikiText(Hub):
    """The configs of Salesforce/wikitext."""

    def assembled(self, rows: Iterable[str], unfinished: list[str]) -> Iterator[str]:
        """The articles that the rows make up: a title follows an empty row, unlike text in such signs in an article."""
        for row in rows:
            line = row or EMPTY_LINE
            after_empty = not unfinished or unfinished[-1] == EMPTY_LINE
            if after_empty and TITLE.fullmatch(line) and any(map(str.strip, unfinished)):
                article = "".join(unfinished)
                unfinished[:] = [line]
                yield article
            else:
                unfinished.append(line)
        article = "".join(unfinished)
        unfinished.clear()
        yield article

    def held_out_rows(self) -> frozenset[int] | None:
        """None, since a row is a line of WikiText, and row numbers cannot hold out whole documents."""
        if self.config.held_out == "nanogpt":
            raise DataError(
                "data.held_out=nanogpt counts rows, which are lines here: use hash or data.validation_split"
            )
        return None
