"""Say where a run began to please its judge alone: `python scripts/proxy.py RUN`.

Written is RUN/validation/manifest.jsonl, which names the validation clips of all rounds. Let gold measure them, another
program or people, into RUN/validation/gold.jsonl, and give the same command again: `align/proxy.py` has the rule.
`scripts/report.py` then draws it.
"""

import sys
from collections.abc import Sequence

from pydantic import DirectoryPath

from align import history, proxy
from reward.config import Config, ConfigError, parse
from reward.files import DataError


class ProxyConfig(Config):
    """Compare a run's judge with gold, round by round."""

    run: DirectoryPath
    """Folder of an alignment, which may still be going on."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program; an error of the user's ends it with status 2."""
    prog = "python scripts/proxy.py"
    config = parse(ProxyConfig, sys.argv[1:] if argv is None else argv, prog=prog, positional="run")
    try:
        told = history.read(config.run)
        print(f"{config.run / 'validation' / 'manifest.jsonl'}: {proxy.list_clips(told)} clips")
        watched = proxy.read(told)
    except (ConfigError, DataError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    if watched is None:
        print(f"not measured yet: let gold measure them into {config.run / 'validation' / 'gold.jsonl'}")
        return
    for track in watched.tracks:
        print(proxy.sentence(track, watched.rounds))


if __name__ == "__main__":
    main()
