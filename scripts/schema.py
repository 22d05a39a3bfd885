"""Write a JSON schema for each file of settings: `python -m scripts.schema [out=FOLDER]`.

An editor completes and checks a YAML file by the schema that its first line names, as in
`# yaml-language-server: $schema=../schema/align.train.AlignConfig.json`.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name

from reward.config import Config, json_schema, parse
from reward.files import replacing

# By name, since nothing imports a program; those that take bare arguments read no file of settings.
SETTINGS = (
    "align.certify:Count",
    "align.certify:Plan",
    "align.train:AlignConfig",
    "reward.train:RewardConfig",
    "sandbox.annotate:AnnotateConfig",
    "sandbox.base:BaseConfig",
    "sandbox.encoder:EncoderConfig",
    "sandbox.quality:QualityConfig",
    "scripts.evaluate:EvaluateConfig",
    "scripts.export_lora:ExportConfig",
    "scripts.house:HouseConfig",
    "scripts.measure_step:MeasureConfig",
    "scripts.sample:SampleConfig",
    "scripts.schema:SchemaConfig",
)
"""The settings of each program, and where they are found."""


class SchemaConfig(Config):
    """Write a JSON schema for each file of settings."""

    out: Path = Path("configs/schema")
    """Folder of the schemas."""


def main(argv: Sequence[str]) -> None:
    """Write the schemas and print their paths."""
    config = parse(SchemaConfig, argv, prog="python -m scripts.schema")
    config.out.mkdir(parents=True, exist_ok=True)
    for place in SETTINGS:
        path = config.out / f"{place.replace(':', '.')}.json"
        text = json.dumps(json_schema(resolve_name(place)), indent=2, ensure_ascii=False)
        with replacing(path) as new:
            new.write_text(f"{text}\n", encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
