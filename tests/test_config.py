import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from reward.config import Config, ConfigError, dump, json_schema, load, parse


class Dpo(Config):
    kind: Literal["dpo"] = "dpo"
    beta: float = Field(0.1, gt=0)
    """Strength of the pull to the reference."""
    label: str | None = None


class Rwr(Config):
    kind: Literal["rwr"] = "rwr"
    temperature: float = 1.0
    label: int = 0


Objective = Annotated[Dpo | Rwr, Field(discriminator="kind")]


class Optim(Config):
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)


class Train(Config):
    """Train a policy."""

    run: Path
    """Folder of the run."""
    objective: Objective
    steps: int = 100
    resume: bool = False
    prompt: str = ""
    prompts: tuple[str, ...] = ()
    precision: Literal["bf16", "fp32"] = "fp32"
    cap: int | Literal["auto"] = "auto"
    cache: Path | None = None
    weights: dict[str, float] = Field(default={})
    stages: list[Objective] = Field(default=[])
    optim: Optim = Optim()

    @model_validator(mode="after")
    def _check(self) -> "Train":
        if self.steps > 1000 and not self.resume:
            raise ValueError(f"steps={self.steps} without resume")
        return self


BASE = ["run=runs/x", "objective.kind=dpo"]


def write(folder: Path, text: str) -> Path:
    path = folder / "x.yaml"
    path.write_text(text)
    return path


def message(path: Path | None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(Train, path, overrides)
    return str(error.value)


# Reading


def test_a_file_and_overrides_give_typed_settings(tmp_path):
    path = write(tmp_path, "run: runs/a\nobjective: {kind: rwr, temperature: 2}\noptim:\n  lr: 1e-5\n")
    config = load(Train, path, ["steps=7", "optim.betas=[0, 1]"])
    assert config == Train(
        run=Path("runs/a"),
        objective=Rwr(temperature=2.0),
        steps=7,
        optim=Optim(lr=1e-5, betas=(0.0, 1.0)),
    )
    assert isinstance(config.objective, Rwr)
    assert type(config.objective.temperature) is float


UNDER = "run: runs/a\nobjective: {kind: dpo, beta: 2, label: a}\nprompts: [a, b]\noptim: {lr: 1e-5, betas: [0, 1]}\n"


def over(folder: Path, text: str) -> Path:
    (folder / "under.yaml").write_text(UNDER)
    return write(folder, f"extends: under.yaml\n{text}")


def test_a_file_that_extends_another_changes_keys_of_its_sections_and_whole_lists(tmp_path):
    config = load(Train, over(tmp_path, "objective: {beta: 3}\nprompts: [c]\noptim: {lr: 1e-3}\n"), ["steps=7"])
    assert config == Train(
        run=Path("runs/a"),
        objective=Dpo(beta=3.0, label="a"),
        prompts=("c",),
        steps=7,
        optim=Optim(lr=1e-3, betas=(0.0, 1.0)),
    )
    assert load(Train, write(tmp_path, dump(config))) == config


@pytest.mark.parametrize(("section", "label"), [("{kind: rwr}", 0), ("{kind: dpo, beta: 3}", "a")])
def test_a_section_of_another_kind_takes_the_place_of_the_whole(tmp_path, section, label):
    assert load(Train, over(tmp_path, f"objective: {section}")).objective.label == label


def test_what_is_wrong_in_one_of_two_files_is_told_with_both(tmp_path):
    assert message(over(tmp_path, "stesp: 7")).startswith(
        f"{tmp_path}/x.yaml over {tmp_path}/under.yaml: stesp: unknown"
    )
    assert message(write(tmp_path, "extends: 3")) == (
        f"{tmp_path}/x.yaml: extends: expected the name of a file beside this one, got 3"
    )
    assert message(write(tmp_path, "extends: x.yaml")) == (
        f"{tmp_path}/x.yaml: extends: {tmp_path}/x.yaml extends a file itself; extend that one, or none"
    )
    assert "absent.yaml: cannot be read" in message(write(tmp_path, "extends: absent.yaml"))
    assert "extends: unknown key" in message(None, *BASE, "extends=under.yaml")


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("steps: one", "steps: should be a valid integer, got 'one'"),
        ("steps: 1.5", "steps: should be a valid integer, got 1.5"),
        ("steps: 1.0", "steps: should be a valid integer, got 1.0"),
        ("steps: '1'", "steps: should be a valid integer, got '1'"),
        ("steps: true", "steps: should be a valid integer, got True"),
        ("steps:", "steps: should be a valid integer, got None"),
        ("resume: 'yes'", "resume: should be a valid boolean, got 'yes'"),
        ("resume: yes", "resume: should be a valid boolean, got 'yes'"),
        ("resume: 1", "resume: should be a valid boolean, got 1"),
        ("prompt: 3", "prompt: should be a valid string, got 3"),
        ("prompts: a", "prompts: should be a valid array, got 'a'"),
        ("precision: fp16", "precision: should be 'bf16' or 'fp32', got 'fp16'"),
        ("cap: atuo", "cap: should be 'auto', got 'atuo'"),
        ("optim: {lr: true}", "optim.lr: should be a valid number, got True"),
        ("optim: {lr: '1'}", "optim.lr: should be a valid number, got '1'"),
        ("optim: {lr: .inf}", "optim.lr: should be a valid number, got '.inf'"),
        ("optim: {lr: 1e999}", "optim.lr: should be a finite number, got inf"),
        ("optim: {betas: [1, x]}", "optim.betas.1: should be a valid number, got 'x'"),
        ("optim: 3", "optim: should be an object, got 3"),
        ("weights: {a: b}", "weights.a: should be a valid number, got 'b'"),
        ("steps: 2000", "steps=2000 without resume"),
        ("stpes: 3", "stpes: unknown key of Train; did you mean 'steps'?"),
        ("optim: {rate: 3}", "optim.rate: unknown key of Optim; known: lr, betas"),
        ("stages: [{kind: dqo}]", "stages.0.kind: unknown kind 'dqo'; did you mean 'dpo'?"),
        (
            "stages: [{kind: rwr, beta: 1}]",
            "stages.0.beta: unknown key of Rwr; known: kind, temperature, label",
        ),
        ("stages: [{beta: 1}]", "stages.0.kind: is missing; expected one of 'dpo', 'rwr'"),
        ("stages: [{kind: dpo, beta: 0}]", "stages.0.beta: should be greater than 0, got 0"),
    ],
)
def test_a_wrong_value_is_told_with_file_key_value_and_expectation(tmp_path, given, problem):
    path = write(tmp_path, f"run: a\nobjective: {{kind: dpo}}\n{given}\n")
    assert f"{path}: {problem}" in message(path).splitlines()


def test_a_typo_in_a_union_member_names_the_member(tmp_path):
    path = write(tmp_path, "run: a\nobjective: {kind: dpo, bta: 1}\n")
    assert message(path) == f"{path}: objective.bta: unknown key of Dpo; did you mean 'beta'?"


def test_all_wrong_keys_are_told_at_once_and_overrides_by_their_own_place(tmp_path):
    path = write(tmp_path, "objective: {kind: dpo}\nsteps: x\n")
    assert message(path, "optim.lr=y").splitlines() == [
        f"{path}: run: is missing",
        f"{path}: steps: should be a valid integer, got 'x'",
        "command line: optim.lr: should be a valid number, got 'y'",
    ]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b"# only a comment\n", "is empty"),
        (b"- a\n- b\n", "holds ['a', 'b']; expected lines of `key: value`"),
        (b"just words", "holds 'just words'; expected"),
        (b"run: \xff\xfe", "cannot be read as a UTF-8 text file"),
        (b"run: a\nrun: b\n", "not readable as YAML: line 2, column 1: key 'run' is given twice"),
        (b"run: &a x\n", "anchors and aliases"),
        (b"run: !!python/name:os.system\n", "tags"),
        (b'run: "\\ud800"\n', "some text is not valid Unicode"),
    ],
)
def test_an_unusable_file_is_told_by_name(tmp_path, content, problem):
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    assert message(path).startswith(f"{path}: ")
    assert problem in message(path)


@pytest.mark.parametrize("name", ["absent.yaml", "."])
def test_a_missing_file_or_a_folder_is_told_by_name(tmp_path, name):
    assert message(tmp_path / name).startswith(f"{tmp_path / name}: cannot be read")


def test_a_config_is_frozen_and_strict_in_python_too():
    config = load(Train, None, BASE)
    with pytest.raises(ValueError, match="frozen"):
        config.steps = 3  # ty: ignore[invalid-assignment]  this must fail
    with pytest.raises(ValueError, match="finite"):
        Optim(lr=float("nan"))


def test_a_default_section_unlike_its_class_is_refused():
    """`optim: {betas: ...}` in a file would silently bring back the class's lr."""
    with pytest.raises(TypeError, match=r"Bad\.optim: set lr in Optim itself"):

        class Bad(Config):
            optim: Optim = Optim(lr=3.0)


# Overrides


@pytest.mark.parametrize(
    "text", ["123", "a=b", "a red ball: rolling", "#1 hit", "null", "", "[x]", "'q'", " a ", "é\n", "&a"]
)
def test_text_of_the_command_line_is_taken_literally(text):
    config = load(Train, None, ["objective.kind=dpo", f"prompt={text}", f"run={text}"])
    assert config.prompt == text
    assert config.run == Path(text)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("cap=3", "cap", 3),
        ("cap=auto", "cap", "auto"),
        ("cache=null", "cache", None),
        ("cache=nulls", "cache", Path("nulls")),
        ("prompts=[a, 'b: c']", "prompts", ("a", "b: c")),
        ("weights.a=1", "weights", {"a": 1.0}),
        ("weights={a: 1e-5}", "weights", {"a": 1e-5}),
        ("optim.lr=1e-5", "optim", Optim(lr=1e-5)),
        ("optim={lr: 2}", "optim", Optim(lr=2.0)),
        ("stages=[{kind: rwr}]", "stages", [Rwr()]),
    ],
)
def test_an_override_is_read_by_the_type_of_its_field(override, key, value):
    assert getattr(load(Train, None, [*BASE, override]), key) == value


@pytest.mark.parametrize(("kind", "label"), [("dpo", "3"), ("rwr", 3)])
def test_the_kind_of_a_section_decides_how_its_values_are_read(kind, label):
    config = load(Train, None, ["run=a", f"objective.kind={kind}", "objective.label=3"])
    assert config.objective.label == label


def test_overrides_change_only_their_key(tmp_path):
    path = write(tmp_path, "run: a\nobjective: {kind: dpo, beta: 2, label: x}\n")
    assert load(Train, path, ["objective.beta=3"]).objective == Dpo(beta=3.0, label="x")


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["steps"], "'steps' is no setting; expected key=value"),
        (["=3"], "'=3' is no setting"),
        (["a..b=3"], "'a..b=3' is no setting"),
        (["steps=3", "steps=4"], "steps: would undo an earlier setting"),
        (["optim.lr=3", "optim={}"], "optim: would undo an earlier setting"),
        (["steps=3", "steps.x=4"], "steps.x: steps is 3, which has no keys"),
        (["stages=[]", "stages.0=4"], "stages.0: stages is [], which has no keys"),
        (["steps=[1"], "steps: not readable as YAML: line 1, column 3:"),
        (["steps="], "steps: should be a valid integer, got None"),
        (["optm.lr=3"], "optm: unknown key of Train; did you mean 'optim'?"),
        (["objective.bta=3"], "objective.bta: unknown key of Dpo; did you mean 'beta'?"),
        (["prompt=\udcff"], "some text is not valid Unicode"),
    ],
)
def test_a_wrong_override_is_told(overrides, problem):
    assert f"command line: {problem}" in message(None, *BASE, *overrides)


def test_an_earlier_section_can_be_refined():
    config = load(Train, None, ["run=a", "objective={kind: dpo, label: x}", "objective.beta=3"])
    assert config.objective == Dpo(beta=3.0, label="x")


# Writing

texts = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    ["no", "1e-5", "null", "", "12:30", "a: b", "#1", "\x85", "\r\n", "~", "010", "{", "\ufeff"]
)
numbers = st.floats(allow_nan=False, allow_infinity=False)
paths = texts.map(Path)
objectives = st.builds(Dpo, beta=st.floats(1e-300, 1e300), label=st.none() | texts) | st.builds(
    Rwr, temperature=numbers, label=st.integers()
)
trains = st.builds(
    Train,
    run=paths,
    objective=objectives,
    steps=st.integers(max_value=1000),
    resume=st.booleans(),
    prompt=texts,
    prompts=st.lists(texts, max_size=3).map(tuple),
    precision=st.sampled_from(["bf16", "fp32"]),
    cap=st.integers() | st.just("auto"),
    cache=st.none() | paths,
    weights=st.dictionaries(texts, numbers, max_size=2),
    stages=st.lists(objectives, max_size=2),
    optim=st.builds(Optim, lr=numbers, betas=st.tuples(numbers, numbers)),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("configs")


@given(config=trains)
def test_dump_then_load_is_identity(folder, config):
    path = folder / "x.yaml"
    path.write_text(dump(config), newline="")
    assert load(Train, path) == config


def test_dump_shows_every_setting_in_order():
    text = dump(load(Train, None, BASE))
    assert text.startswith("run: runs/x\nobjective:\n  kind: dpo\n  beta: 0.1\n  label: null\nsteps: 100\n")
    assert text.endswith("optim:\n  lr: 0.0001\n  betas:\n  - 0.9\n  - 0.999\n")


def test_json_schema_names_keys_types_and_meanings():
    schema = json_schema(Train)
    assert json.loads(json.dumps(schema)) == schema
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["anyOf"] == [{"required": ["extends"]}, {"required": ["run", "objective"]}]
    assert schema["properties"]["extends"]["type"] == "string"
    assert schema["additionalProperties"] is False
    assert schema["properties"]["run"]["description"] == "Folder of the run."
    assert schema["$defs"]["Dpo"]["properties"]["beta"]["exclusiveMinimum"] == 0


# Command line


def ends(capsys, argv: list[str], **options: Any) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as end:
        parse(Train, argv, prog="prog", **options)
    return end.value.code, *capsys.readouterr()


def test_parse_reads_a_file_and_overrides(tmp_path):
    path = write(tmp_path, "run: a\nobjective: {kind: dpo}\n")
    assert parse(Train, [str(path), "steps=3"], prog="prog") == load(Train, path, ["steps=3"])


def test_help_shows_key_type_default_and_meaning(capsys):
    code, out, err = ends(capsys, ["--help", "stpes=3"])
    assert (code, err) == (0, "")
    assert out.startswith("usage: prog [FILE.yaml] [key=value ...] [--help] [--dry-run]\n\nTrain a policy.\n")
    for line in [
        "  run: path, required\n      Folder of the run.\n",
        "  objective: Dpo | Rwr, required\n",
        "  objective.beta: float > 0 = 0.1   (of Dpo)\n      Strength of the pull to the reference.\n",
        "  steps: int = 100\n",
        '  precision: bf16 | fp32 = "fp32"\n',
        '  cap: int | auto = "auto"\n',
        "  cache: path | null = null\n",
        "  prompts: tuple[text, ...] = []\n",
        "  weights: dict[text, float] = {}\n",
        "  optim: Optim\n  optim.lr: float = 0.0001\n",
    ]:
        assert line in out


def test_dry_run_prints_settings_that_load_back(capsys, tmp_path):
    code, out, err = ends(capsys, [*BASE, "--dry-run"])
    assert (code, err) == (0, "")
    assert load(Train, write(tmp_path, out)) == load(Train, None, BASE)


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--steps", "3"], "unknown option --steps; settings are given as key=value"),
        (["--steps=3"], "unknown option --steps=3"),
        (["a.yaml", "b.yaml"], "expected at most one file of settings, got a.yaml, b.yaml"),
        (
            ["run=a", "steps=x", "--dry-run"],
            "command line: objective: is missing\ncommand line: steps: should be",
        ),
    ],
)
def test_a_wrong_command_ends_with_status_2(capsys, argv, problem):
    code, out, err = ends(capsys, argv)
    assert (code, out) == (2, "")
    assert err.startswith(f"prog: {problem}")


def test_bare_arguments_fill_a_list_literally():
    config = parse(Train, ["a: b", *BASE, "12", "#x"], prog="prog", positional="prompts")
    assert config.prompts == ("a: b", "12", "#x")
    assert parse(Train, BASE, prog="prog", positional="prompts").prompts == ()


def test_one_bare_argument_fills_a_scalar(capsys):
    argv = ["objective.kind=dpo", "123"]
    assert parse(Train, argv, prog="prog", positional="run").run == Path("123")
    assert parse(Train, [*BASE, "12"], prog="prog", positional="steps").steps == 12
    assert ends(capsys, [*argv, "4"], positional="run")[2] == "prog: expected one run, got 2: 123, 4\n"
    assert "run: given both as '123' and as run=..." in ends(capsys, [*argv, "run=4"], positional="run")[2]
    assert "usage: prog RUN ... [key" in ends(capsys, ["--help"], positional="run")[1]


def test_importing_the_config_is_light():
    """Programs answer `--help` at once: nothing heavy may be imported for it."""
    code = "import sys, reward.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
