"""Columns of tables: which of them holds the LR, the loss, the width and the rest, whatever they are called."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cache

from mupsweep.errors import ConfigError, DataError
from mupsweep.formatting import nearest
from mupsweep.store.table_cells import Cells

# What a column may mean: tiers of names without case and punctuation, the better ones first. A name within a tier is as
# good as another; the meaning's own name is better than all of them.
MEANINGS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "model": (("modelname", "modeltype", "arch", "architecture", "network"),),
    "optimizer": (("optimizername", "optimizertype", "optimiser", "optim", "opt"),),
    "parametrization": (
        ("parametrizationname", "parameterization", "parametrisation", "parameterisation", "param", "scheme"),
        ("usemup", "mup", "mupenabled"),  # yes or no
    ),
    "width": (
        ("dmodel", "hiddensize", "hiddendim", "nembd", "nembed", "embeddim", "embeddingdim", "modeldim", "modelwidth"),
        ("dim", "hidden"),
    ),
    "depth": (("nlayer", "nlayers", "numlayers", "numhiddenlayers", "numblocks", "nblocks", "modeldepth"), ("layers",)),
    "width_ratio": (),
    "depth_ratio": (),
    "lr": (
        (
            *("learningrate", "optimizerlr", "optimizerlearningrate", "optimlr", "traininglr", "traininglearningrate"),
            *("baselr", "baselearningrate", "maxlr", "maxlearningrate", "peaklr", "peaklearningrate", "initlr"),
            "initiallr",
        ),
        ("eta",),
    ),
    "log2_lr": (("log2lr", "log2learningrate", "lrlog2", "log2baselr", "log2maxlr", "log2eta", "lglr"),),
    "seed": (("randomseed", "rngseed", "trainingseed", "modelseed"),),
    "status": (("state", "runstate"),),
    "val_loss": (
        (
            *("validationloss", "validloss", "evalloss", "evaluationloss", "lossval", "lossvalidation", "losseval"),
            *("finalvalloss", "vallossfinal", "finalvalidationloss", "finalevalloss", "devloss", "heldoutloss"),
            *("vallossnats", "validationlossnats", "evalvalloss", "valloss", "valcrossentropy", "evalcrossentropy"),
        ),
        ("testloss", "losstest", "finaltestloss"),
        ("finalloss", "lossfinal", "loss", "lossnats", "crossentropy", "nll"),
    ),
    "horizon": (("horizontokens", "traininghorizon"),),
    "tokens": (
        ("trainingtokens", "traintokens", "totaltokens", "numtokens", "ntokens", "numtraintokens", "tokensseen"),
    ),
    "parameters": (
        (
            *("nparameters", "numparameters", "parametercount", "modelparameters", "totalparameters"),
            *("nonembeddingparameters", "nparams", "numparams", "paramcount", "modelparams", "totalparams"),
        ),
        ("params",),
    ),
    "batch_size": (("globalbatchsize", "totalbatchsize", "trainingbatchsize", "trainbatchsize", "batch", "bs"),),
    "flops": (),
    "hyperparameter": (),
    "value": (),
    "default": (),
    "validation": (),
}
YES, NO = ("true", "yes", "1"), ("false", "no", "0")
_CONTENTS: Mapping[str, Callable[[str], bool]] = {  # a column of that name with other cells is none of ours
    "validation": lambda cell: cell.casefold() in (*YES, *NO, ""),
    "parameters": lambda cell: cell[:1].isdigit() or not cell,
}
_BY_LAST_PART = ("lr", "log2_lr", "width", "depth", "seed", "batch_size")  # trainer.optim.lr is an LR as well
_WRAPPERS = ("config", "summary", "summary_metrics", "hparams", "args", "params", "metrics")  # of exported runs
MOST_NAMED = 20  # columns in a message


@dataclass(frozen=True)
class Columns:
    """Which column of a table holds what.

    Attributes:
        index: meaning -> place of its column.
        names: meaning -> name of its column, as in the table.
        passed_over: lines about columns that fit too and hold something else.
    """

    index: Mapping[str, int]
    names: Mapping[str, str]
    passed_over: tuple[str, ...]

    def line(self) -> str:
        """What was matched, for people: lr = optimizer.lr, width."""
        renamed = (name if name == meaning else f"{meaning} = {name}" for meaning, name in self.names.items())
        return ", ".join(renamed)


def parse_columns(words: Sequence[str]) -> dict[str, str]:
    """lr=optimizer.lr,val_loss=eval/loss -> {"lr": "optimizer.lr", "val_loss": "eval/loss"}."""
    given: dict[str, str] = {}
    for pair in (pair for word in words for pair in re.split(r",(?=\w+=)", word)):
        meaning, equals, name = pair.partition("=")
        if not equals or meaning not in MEANINGS:
            raise ConfigError(
                f"--columns {pair}: expected MEANING=COLUMN, as lr=optimizer.lr,val_loss=eval/loss; "
                f"{nearest(meaning, MEANINGS)}"
            )
        if given.setdefault(meaning, name) != name:
            raise ConfigError(f"--columns {pair}: {meaning}={given[meaning]} is given too; name one of them")
    return given


def match_columns(cells: Cells, given: Mapping[str, str]) -> Columns:
    """The columns of a table by what they mean: as given, else by their names.

    Args:
        given: meaning -> column; an empty one leaves the meaning out.

    Raises:
        DataError: two columns fit equally well, or one that is needed is missing.
    """
    index = {
        meaning: find_column(cells, name, f"--columns {meaning}={name}") for meaning, name in given.items() if name
    }
    passed_over: list[str] = []
    for meaning in MEANINGS:
        if meaning in given:
            continue
        candidates = _candidates(cells, meaning, set(index.values()))
        if not candidates:
            continue
        _, best = candidates[0]
        others = [i for _, i in candidates[1:] if cells.column(i) != cells.column(best) and any(cells.column(i))]
        for rank, other in candidates[1:]:
            if rank == candidates[0][0] and other in others:
                one, two = cells.columns[best], cells.columns[other]
                if one == two:
                    raise DataError(f"--from {cells.source} has two columns called {one}: rename one of them")
                raise DataError(
                    f"--from {cells.source}: is {meaning} in {one} or {two}? Choose with {_option(meaning, one)}"
                )
        if others:
            names = ", ".join(sorted(cells.columns[i] for i in others))
            passed_over.append(
                f"{meaning} is read from {cells.columns[best]}, not {names}: --columns {meaning}=NAME takes another"
            )
        index[meaning] = best
    _require(cells, index, given)
    if "hyperparameter" in index and "value" not in index:
        raise DataError(
            f"--from {cells.source} has a column {cells.columns[index['hyperparameter']]} and no column value: "
            "--columns value=NAME says which it is, --columns hyperparameter= leaves both out"
        )
    if "hyperparameter" not in index:
        index = {key: i for key, i in index.items() if key not in ("value", "default")}
    names = {meaning: cells.columns[index[meaning]] for meaning in MEANINGS if meaning in index}
    return Columns(index, names, tuple(passed_over))


def find_column(cells: Cells, name: str, asked: str) -> int:
    """The place of a column that the user named, whatever its case and punctuation.

    Args:
        asked: the option, for the message.
    """
    exact = [i for i, column in enumerate(cells.columns) if column == name]
    alike = exact or [i for i, column in enumerate(cells.columns) if _plain(column) == _plain(name)]
    if len(alike) != 1:
        several = "has two columns of that name" if alike else f"has no column {name}"
        raise DataError(f"--from {cells.source} {several} ({asked}): it has {_listed(cells.columns)}")
    return alike[0]


def means(name: str, meaning: str) -> bool:
    """Whether a column's name has a meaning, though another may have it more."""
    return _fit(name, meaning) is not None


def _candidates(cells: Cells, meaning: str, used: Set[int]) -> list[tuple[tuple[bool, int], int]]:
    """(rank, place) of the unused columns that may have a meaning, the best first; those without content come last."""
    found = []
    for i, name in enumerate(cells.columns):
        fit = _fit(name, meaning)
        is_other = meaning in _CONTENTS and not all(map(_CONTENTS[meaning], cells.column(i)))
        if fit is not None and i not in used and not is_other:
            found.append(((not any(cells.column(i)), fit), i))
    return sorted(found, key=lambda candidate: (candidate[0], cells.columns[candidate[1]]))


@cache
def _fit(name: str, meaning: str) -> int | None:
    """How well a name fits a meaning, 0 is best; None where it does not."""
    tiers = ((_plain(meaning),), *MEANINGS[meaning])
    parts = re.split(r"\.|__", name.casefold())
    while len(parts) > 1 and parts[0] in _WRAPPERS:
        parts = parts[1:]
    whole, last = _plain(".".join(parts)), _plain(parts[-1])
    for rank, names in enumerate(tiers):
        if whole in names:
            return rank
    is_path = meaning in _BY_LAST_PART and len(parts) > 1
    return len(tiers) if is_path and any(last in names for names in tiers) else None


def _require(cells: Cells, index: Mapping[str, int], given: Mapping[str, str]) -> None:
    """Refuse a table without LR, loss or width."""
    needed = [("lr", "lr or log2_lr"), ("val_loss", "val_loss"), ("width", "width")]
    stand_ins = {"lr": ("log2_lr",), "width": ("parameters",)}
    for meaning, name in needed:
        is_left_out = meaning == "width" and "width" in given
        if is_left_out or any(column in index for column in (meaning, *stand_ins.get(meaning, ()))):
            continue
        of_perplexity = [column for column in cells.columns if re.search("perplexity|ppl$", _plain(column))]
        if meaning == "val_loss" and of_perplexity:
            raise DataError(
                f"--from {cells.source} has no column val_loss: perplexities are read with "
                f"{_option(meaning, of_perplexity[0])} --unit perplexity"
            )
        if all(_is_number(column) for column in cells.columns):
            raise DataError(
                f"--from {cells.source} has no heading, its first row is numbers: put names above them, such as "
                "width,lr,val_loss"
            )
        likely = _most_alike(meaning, [column for i, column in enumerate(cells.columns) if i not in index.values()])
        alone = "; where all runs are of one width, --columns width=" if meaning == "width" else ""
        raise DataError(
            f"--from {cells.source} has no column {name}: it has {_listed(cells.columns)}; "
            f"{_option(meaning, likely or 'NAME')} says which it is{alone}"
        )


def _option(meaning: str, column: str) -> str:
    """The option that names a column, as one types it in a shell."""
    return f"--columns {shlex.quote(f'{meaning}={column}')}"


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "."))
    except ValueError:
        return False
    return True


def _most_alike(meaning: str, columns: Sequence[str]) -> str | None:
    """The column whose name is most like those of a meaning, if any is."""
    names = [_plain(meaning), *(name for tier in MEANINGS[meaning] for name in tier)]
    likeness = {
        column: max(difflib.SequenceMatcher(None, _plain(column), name).ratio() for name in names) for column in columns
    }
    likely = max(likeness, key=lambda column: likeness[column], default=None)
    return likely if likely is not None and likeness[likely] > 0.6 else None


def _listed(columns: Sequence[str]) -> str:
    named = [column for column in columns if column]
    more = f" and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
    return (", ".join(named[:MOST_NAMED]) or "none") + more


def _plain(name: str) -> str:
    """A name without case and punctuation."""
    return "".join(char for char in name.casefold() if char.isalnum())
