"""What can go wrong with a set of the hub: each is one line that says what to do, and shows no token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub import FINEWEB_COMMIT, digest
from loopback import TOKEN, Client, own

from mupsweep.data import sources
from mupsweep.data.config import DataConfig
from mupsweep.data.sources.hub_errors import hub_error

BAD: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "config": (["data=fineweb", "data.hub_config=sample-10TB"], ("sample-10TB: did you mean 'sample-10BT'?",)),
    "no config": (["data=wikitext103", "data.hub_config=null"], ("data.hub_config=None", "wikitext-103-raw-v1")),
    "split": (["data=fineweb", "data.split=trian"], ("data.split=trian", "did you mean 'train'? valid: train")),
    "validation split": (
        ["data=wikitext103", "data.validation_split=valid"],
        ("data.validation_split=valid", "did you mean 'validation'?"),
    ),
    "column": (["data=fineweb", "data.text_column=txet"], ("text_column=txet", "did you mean 'text'?", "url")),
    "column of json": (own("odd/json", "data.text_column=txt"), ("text_column=txt", "'text'? valid: n, text")),
    "no text": (["data=fineweb", "data.text_column=token_count"], ("it is int, not text", "valid: date", "text")),
    "files": (["data=fineweb", "data.data_files=[no/*]"], ("data.data_files=['no/*']", "/tree/" + FINEWEB_COMMIT)),
    "commit": (["data=fineweb", f"data.revision={'0' * 40}"], ("data.revision=0000", "/commits/main")),
    "branch": (["data=fineweb", "data.revision=main"], (f"set data.revision={FINEWEB_COMMIT}, which is main now",)),
    "null": (["data=fineweb", "data.revision=null"], ("no full commit", f"set data.revision={FINEWEB_COMMIT}, ")),
    "no branch": (["data=fineweb", "data.revision=v9"], ("set the 40 digits", "asking failed")),
    "id": (own("no/such"), ("data.hub_id=no/such", "no such data set on http://127.0.0.1", "hf auth login")),
    "no id": (["data=fineweb", "data.hub_id=a/b/c"], ("data.hub_id=a/b/c", "expected ORGANISATION/NAME")),
    "script": (own("old/scripted"), ("old/scripted is a loading script", "refs/convert/parquet")),
    "converted script": (
        own("old/converted"),
        (f"set data.revision={digest('old/converted')}, its branch refs/convert/parquet",),
    ),
    "gated": (own("closed/gated"), ("closed/gated is gated: accept its terms on http://127.0.0.1", "HF_TOKEN")),
    "broken": (own("odd/broken"), ("odd/broken cannot be read: ArrowInvalid",)),
    "empty": (own("odd/empty"), ("odd/empty has no file that datasets reads", "parquet")),
    "rows": (
        ["data=openwebtext", "data.held_out=nanogpt"],
        ("data.rows=8013769, but split train of Skylion007/openwebtext has 60: set data.rows=60",),
    ),
    "lines": (
        ["data=wikitext103", "data.validation_split=null", "data.held_out=nanogpt", "data.rows=9"],
        ("data.held_out=nanogpt counts rows, which are lines here",),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_a_user_can_get_wrong_is_one_line(case: str, client: Client, tmp_path: Path) -> None:
    overrides, expected = BAD[case]
    answer = client.prepare(*overrides, f"data.cache={tmp_path}")
    assert answer["code"] == 2
    (line,) = answer["err"].splitlines()
    assert line.startswith("mupsweep: ")
    for fragment in expected:
        assert fragment in line
    assert not list(tmp_path.glob("[!.]*"))


CONTRADICTIONS = [
    ({"hub_id": None}, "data=mine needs data.hub_id=ORGANISATION/NAME"),
    ({"path": "x"}, "data.path=x is not read by data=mine: add data=local"),
    ({"validation_split": "v", "data_files": ("a",)}, "data.validation_split=v and data.data_files="),
    ({"validation_split": "v", "held_out": "nanogpt"}, "data.validation_split=v and data.held_out=nanogpt"),
    ({"held_out": "nanogpt"}, "set data.rows to how many there are (now None)"),
    ({"held_out": "nanogpt", "rows": 3, "max_tokens": 5}, "data.max_tokens=null (now 5)"),
]


@pytest.mark.parametrize(("keys", "expected"), CONTRADICTIONS)
def test_keys_that_contradict_each_other_are_refused_without_asking_the_hub(
    keys: dict[str, Any], expected: str
) -> None:
    tree = {"name": "mine", "kind": "mupsweep.data.sources.hub.Hub", "hub_id": "a/b", "revision": "0" * 40}
    with pytest.raises(Exception, match=r"^data") as caught:
        sources.load(DataConfig(**{**tree, **keys}))
    assert expected in str(caught.value)


def test_a_token_opens_a_gated_set_and_is_never_shown(other: Callable[..., Client], tmp_path: Path) -> None:
    overrides = own("closed/gated", f"data.cache={tmp_path}", "data.validation_fraction=0.2")
    answer = other(HF_TOKEN=TOKEN).prepare(*overrides)
    assert (answer["code"], answer["err"]) == (0, "")
    assert TOKEN not in answer["out"]
    message = str(hub_error(ValueError(f"Bearer {TOKEN} at https://me:{TOKEN}@host failed"), DataConfig(hub_id="a/b")))
    assert message == "a/b cannot be read: ValueError: Bearer *** at https://***host failed"


def test_without_a_hub_the_wait_is_short_and_what_is_prepared_stays_usable(
    client: Client, other: Callable[..., Client], tmp_path: Path
) -> None:
    overrides = ["data=fineweb", "data.validation_fraction=0.2", f"data.cache={tmp_path}"]
    assert client.prepare(*overrides)["code"] == 0
    gone = other("http://127.0.0.1:9", HF_HUB_OFFLINE="0")
    offline = other(HF_HUB_OFFLINE="1")
    for one in (gone, offline):
        assert one.prepare(*overrides)["code"] == 0
        assert one(cli=["data", "verify", *overrides])["code"] == 0
    answer = gone.prepare("data=openwebtext", f"data.cache={tmp_path}")
    assert answer["code"] == 2
    assert answer["err"].startswith("mupsweep: the hub http://127.0.0.1:9 cannot be reached (")
    assert "HF_ENDPOINT" in answer["err"]
    answer = offline.prepare("data=openwebtext", f"data.cache={tmp_path}")
    assert (answer["code"], answer["err"]) == (
        2,
        "mupsweep: Skylion007/openwebtext is not prepared and HF_HUB_OFFLINE is set: unset it, or prepare it on a "
        "machine with a network and point data.cache to that folder\n",
    )


def test_a_cache_of_the_libraries_that_cannot_be_written_is_one_line(
    other: Callable[..., Client], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("where a folder is wanted")
    answer = other(HF_HOME=str(tmp_path / "file")).prepare("data=fineweb", f"data.cache={tmp_path / 'cache'}")
    assert answer["code"] == 2
    assert answer["err"].startswith("mupsweep: the libraries that read HuggingFaceFW/fineweb cannot write (Not a dir")
    assert answer["err"].endswith("set HF_HOME to a writable folder with free space\n")


def test_without_the_library_the_message_says_what_to_install(other: Callable[..., Client], tmp_path: Path) -> None:
    answer = other(WITHOUT_DATASETS="1").prepare("data=fineweb", f"data.cache={tmp_path}")
    assert answer["code"] == 2
    assert "pip install datasets" in answer["err"]
    assert len(answer["err"].splitlines()) == 1
