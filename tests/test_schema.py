import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from reward import plain_yaml
from scripts import schema

ROOT = Path(__file__).parents[1]
CONFIGS = {
    "align": "align.train.AlignConfig",
    "certify": "align.certify.Plan",
    "evaluate": "scripts.evaluate.EvaluateConfig",
    "reward": "reward.train.RewardConfig",
    "sample": "scripts.sample.SampleConfig",
    "sandbox": "sandbox.base.BaseConfig",
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("schema") / "new"
    schema.main([f"out={out}"])
    return out


def programs() -> Iterator[str]:
    """Where `parse` is called for a program that may be given a file of settings."""
    for path in (
        path for package in ("align", "reward", "sandbox", "scripts") for path in (ROOT / package).rglob("*.py")
    ):
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            words = {keyword.arg for keyword in call.keywords}
            if "prog" in words and "positional" not in words and ast.unparse(call.func).endswith("parse"):
                yield f"{'.'.join(path.relative_to(ROOT).with_suffix('').parts)}:{ast.unparse(call.args[0])}"


def test_every_program_that_reads_a_file_of_settings_has_a_schema():
    assert sorted(programs()) == list(schema.SETTINGS)


def test_each_schema_is_written_and_the_same_bytes_again(written: Path, tmp_path: Path):
    assert {path.name for path in written.iterdir()} == {f"{place.replace(':', '.')}.json" for place in schema.SETTINGS}
    schema.main([f"out={tmp_path}"])
    for path in written.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
        found = json.loads(path.read_text())
        assert found["$schema"] == "https://json-schema.org/draft/2020-12/schema"
        assert (found["type"], found["additionalProperties"]) == ("object", False)
        assert found["title"] == path.stem.split(".")[-1]


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*/*.yaml")), ids=lambda path: path.stem)
def test_our_own_files_have_only_keys_of_their_schema(written: Path, path: Path):
    found = json.loads((written / f"{CONFIGS[path.parent.name]}.json").read_text())
    keys = plain_yaml.read(path.read_text()).keys()
    assert keys <= found["properties"].keys()
    assert any(keys >= set(choice["required"]) for choice in found["anyOf"])
