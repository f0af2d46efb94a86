"""mupsweep data"""

from __future__ import annotations

import typer

from mupsweep.cli.options import ConfigDir, Json, Overrides

app = typer.Typer(help="Prepare, list and verify token shards.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def prepare(overrides: Overrides = None, config_dir: ConfigDir = None) -> None:
    """Tokenize a corpus now, so that no run waits for it.

    Run the same command again to go on after an interruption.

    Example: mupsweep data prepare data=local data.path=my.jsonl data.tokenizer=gpt2
    """
    from mupsweep.report.terminal import corpora

    corpora.prepare_data(overrides or (), config_dir)


@app.command("list")
def list_prepared(overrides: Overrides = None, config_dir: ConfigDir = None, json: Json = False) -> None:
    """List the prepared corpora of the cache.

    Example: mupsweep data list
    """
    from mupsweep.report.terminal import corpora

    corpora.show_prepared(overrides or (), config_dir, as_json=json)


@app.command()
def verify(overrides: Overrides = None, config_dir: ConfigDir = None) -> None:
    """Check every shard of a prepared corpus against its digest.

    Example: mupsweep data verify data.tokenizer=bytes
    """
    from mupsweep.report.terminal import corpora

    corpora.verify_data(overrides or (), config_dir)
