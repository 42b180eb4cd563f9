"""Settings, which stand once, in ``LoraConfig``: the callback and the command line have them from there."""

import dataclasses
import enum
import inspect
import pickle
import re
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import yaml
from helpers.settings import DictConfig, ListConfig
from hypothesis import given
from hypothesis import strategies as st

from lightning_lora import LoRA, LoraConfig
from lightning_lora.cli.main import main
from lightning_lora.signature import takes

FIELDS = dataclasses.fields(LoraConfig)
OWN = [
    "config",
    "merge",
    "export_dir",
    "adapter",
    "module",
    "adapter_name",
    "summary",
    "base_dtype",
    "on_nan",
    "verify",
]


def words(text: str) -> str:
    return " ".join(text.replace("#", " ").split())


def described(owner: Any) -> dict[str, str]:
    """What a docstring says on each argument."""
    block = re.search(r"\nArgs:\n(.*?)(?:\n\n|\Z)", inspect.getdoc(owner) or "", re.DOTALL)
    assert block
    found = re.split(r"^    (\w+): ", block[1], flags=re.MULTILINE)[1:]
    return {name: words(text) for name, text in zip(found[::2], found[1::2])}


def test_every_setting_is_in_the_signature() -> None:
    parameters = inspect.signature(LoRA).parameters
    assert list(parameters) == [*(field.name for field in FIELDS), *OWN]
    for field in FIELDS:
        parameter = parameters[field.name]
        assert parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        if field.default_factory is dataclasses.MISSING:
            assert (parameter.default, parameter.annotation) == (field.default, field.type)
        else:
            assert (parameter.default, parameter.annotation) == (None, field.type | None)
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in OWN)


def test_what_reads_annotations_sees_the_same() -> None:
    hints = get_type_hints(LoRA.__init__)
    assert hints == {name: p.annotation for name, p in inspect.signature(LoRA).parameters.items()} | {
        "return": type(None)
    }


def test_every_setting_has_its_words() -> None:
    assert list(described(LoraConfig)) == [field.name for field in FIELDS]
    assert list(described(LoRA)) == OWN
    assert described(LoRA.__init__) == described(LoraConfig)


def test_every_setting_has_its_words_in_the_help(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100000")
    with pytest.raises(SystemExit):
        main(["fit", "--trainer.callbacks.help", "lightning_lora.LoRA"])
    out = words(capsys.readouterr().out)
    for name, text in (described(LoraConfig) | described(LoRA)).items():
        assert re.search(rf"--trainer\.callbacks\.{name} \S.* {re.escape(text)} \(type: ", out), name


def test_every_setting_has_its_words_in_a_commented_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"class_path": "lightning_lora.LoRA", "init_args": {"r": 3}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [settings]}}))
    arguments = ["fit", "--config", "chat_sft", "--config", str(tmp_path / "mine.yaml")]
    with pytest.raises(SystemExit):
        main([*arguments, "--print_config=comments"])
    out = words(capsys.readouterr().out)
    missing = [name for name, text in (described(LoraConfig) | described(LoRA)).items() if text not in out]
    assert not missing


def test_settings_of_an_older_run_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Version 0.1 wrote ``null`` for patterns that there are none of."""
    settings = {"rank_pattern": None, "alpha_pattern": None, "target_modules": ["q_proj"]}
    callback = {"class_path": "lightning_lora.LoRA", "init_args": settings}
    (tmp_path / "old.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    with pytest.raises(SystemExit):
        main(["fit", "--config", "chat_sft", "--config", str(tmp_path / "old.yaml"), "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"][0]["init_args"]
    assert printed["rank_pattern"] is None and list(printed) == [*(field.name for field in FIELDS), *OWN]
    assert LoRA(**printed).config == LoraConfig(target_modules=["q_proj"])


def test_settings_by_position_and_by_name() -> None:
    assert LoRA(8, 32).config == LoRA(r=8, lora_alpha=32).config == LoraConfig(8, 32)
    with pytest.raises(TypeError, match="positional arguments"):
        LoRA(*(field.default for field in FIELDS), None)
    with pytest.raises(TypeError, match=re.escape("LoRA.__init__() got an unexpected keyword argument 'ranks'")):
        LoRA(ranks=8)  # type: ignore[call-arg]


def test_wrong_settings_are_the_errors_of_the_config() -> None:
    for wrong in ({"r": "8"}, {"bias": "some"}, {"target_modules": []}, {"rank_pattern": {"q": 0}}):
        with pytest.raises(ValueError) as one:  # noqa: PT011
            LoraConfig(**wrong)
        with pytest.raises(ValueError, match=re.escape(str(one.value))):
            LoRA(**wrong)


def test_a_config_goes_without_settings_beside_it() -> None:
    config = LoraConfig(r=5, bias="all")
    assert LoRA(config=config, merge=None).config is config
    for field, other in (("r", 3), ("seed", 1), ("rank_pattern", {"q": 2})):
        with pytest.raises(ValueError, match="both a config and settings"):
            LoRA(config=config, **{field: other})


class Mine(LoRA):
    def __init__(self) -> None:
        super().__init__(r=4)


class Other(LoRA):
    def __init__(self, *args: Any, note: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.note = note


def test_subclasses_and_pickling() -> None:
    assert type(Mine().config) is LoraConfig and Mine().config.r == 4
    other = pickle.loads(pickle.dumps(Other(2, note="n", export_dir="x")))
    # By name, for the test module may have been imported under another one.
    assert (type(other).__qualname__, other.config.r, other.note, other.export_dir) == ("Other", 2, "n", Path("x"))
    with pytest.raises(TypeError):
        Mine(r=3)  # type: ignore[call-arg]


def test_a_new_setting_is_taken_from_one_place() -> None:
    @dataclasses.dataclass(frozen=True)
    class Settings:
        """Words on it.

        Args:
            new: The newest.
            kept: Made for each.
        """

        new: int = 3
        kept: list[int] = dataclasses.field(default_factory=list)

    class Taker:
        @takes(Settings)
        def __init__(self, given: Settings) -> None:
            self.given = given

    assert str(inspect.signature(Taker)) == "(new: int = 3, kept: list[int] | None = None) -> None"
    assert Taker(new=4).given == Settings(4, [])
    assert Taker.__init__.__doc__ == Settings.__doc__


@pytest.mark.slow
def test_type_checkers_know_every_setting(tmp_path: Path) -> None:
    api = pytest.importorskip("mypy.api")
    lines = {
        'LoRA(r=8, target_modules=["q"])': "",
        "LoRA(8, 16.0, merge=None, config=LoraConfig(r=2))": "",
        'LoRA(export_dir="x").config.r + 1': "",
        "LoRA(ranks=8)": "call-arg",
        'LoRA(r="8")': "arg-type",
        "LoRA(merge=3)": "arg-type",
        "lightning_lora.Lora": "attr-defined",
    }
    code = ["import lightning_lora", "from lightning_lora import LoRA, LoraConfig", *lines]
    (tmp_path / "code.py").write_text("\n".join(code) + "\n")
    out, _, _ = api.run(["--strict", "--ignore-missing-imports", str(tmp_path / "code.py")])
    found = dict(re.findall(r"code\.py:(\d+): error: .*\[([\w-]+)\]", out))
    assert found == {str(number): error for number, error in enumerate(lines.values(), 3) if error}, out


# What comes in other types than it should.


class Start(str, enum.Enum):  # noqa: UP042 -- as much code still has it
    PISSA = "pissa"


def test_settings_of_other_libraries_become_plain() -> None:
    given: dict[str, Any] = {
        "r": np.int64(4),
        "lora_alpha": np.float32(8),
        "lora_dropout": np.float64(0.5),
        "target_modules": ListConfig(["q", np.str_("v")]),
        "exclude_modules": {"z", "y"},
        "trainable_token_indices": DictConfig({"embed": ListConfig([np.int32(7), 3])}),
        "rank_pattern": DictConfig({"q": np.int8(2)}),
        "alpha_pattern": DictConfig({}),
        "layers_to_transform": range(2),
        "layers_pattern": Path("layers"),
        "use_rslora": np.bool_(True),
        "init_lora_weights": Start.PISSA,
    }
    expected: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8.0,
        "lora_dropout": 0.5,
        "target_modules": ["q", "v"],
        "exclude_modules": ["y", "z"],
        "trainable_token_indices": {"embed": [7, 3]},
        "rank_pattern": {"q": 2},
        "alpha_pattern": {},
        "layers_to_transform": [0, 1],
        "layers_pattern": "layers",
        "use_rslora": True,
        "init_lora_weights": "pissa",
    }
    config = LoraConfig(**given)
    assert repr(config.to_dict()) == repr(LoraConfig(**expected).to_dict())
    assert config == LoraConfig(**expected) == LoRA(**given).config == LoraConfig.from_dict(config.to_dict())
    assert config.to_dict() == config.to_dict() | expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": np.float32(4)}, "r is 4.0"),
        ({"r": np.bool_(True)}, "r is True"),
        ({"lora_alpha": 1j}, "lora_alpha is 1j"),
        ({"lora_dropout": "0.1"}, "lora_dropout is '0.1'"),
        ({"lora_dropout": None}, "lora_dropout is None"),
        ({"rank_dropout": [0.1]}, r"rank_dropout is \[0.1\]"),
        ({"vera_d_initial": "a"}, "vera_d_initial is 'a'"),
        ({"rank_pattern": "q"}, "rank_pattern is 'q', but it must be a dict"),
        ({"rank_pattern": ListConfig(["q"])}, "rank_pattern is .*, but it must be a dict"),
        ({"alpha_pattern": 3}, "alpha_pattern is 3, but it must be a dict"),
        ({"target_modules": b"q"}, "target_modules is of type bytes"),
        ({"target_modules": DictConfig({"q": 1})}, "target_modules is of type dict"),
        ({"exclude_modules": object()}, "exclude_modules is of type object"),
        ({"target_parameters": "experts"}, "target_parameters is 'experts'"),
        ({"trainable_token_indices": np.array([1.5])}, r"trainable_token_indices is \[1.5\]"),
    ],
)
def test_wrong_types_are_one_clear_error(settings: dict[str, Any], message: str) -> None:
    for take in (LoraConfig, LoRA):
        with pytest.raises(ValueError, match=f"^{message}"):
            take(**settings)


names = st.sampled_from(["q", "k", "v", "o"])
lists = st.sampled_from([list, tuple, frozenset, np.array, ListConfig])
settings = st.fixed_dictionaries(
    {},
    optional={
        "r": st.integers(1, 99).map(np.int64),
        "lora_alpha": st.floats(0.5, 64, width=32).map(np.float32),
        "target_modules": st.builds(lambda kind, items: kind(items), lists, st.lists(names, min_size=1)),
        "rank_pattern": st.dictionaries(names, st.integers(1, 9).map(np.int16)).map(DictConfig),
        "alpha_pattern": st.none() | st.dictionaries(names, st.integers(1, 9)),
        "layers_to_transform": st.builds(lambda kind, items: kind(items), lists, st.lists(st.integers(0, 9))),
        "use_rslora": st.booleans().map(np.bool_),
        "seed": st.integers(0, 9).map(np.uint8),
    },
)


@given(settings)
def test_to_dict_is_always_plain(given: dict[str, Any]) -> None:
    values = LoraConfig(**given).to_dict()
    # What YAML writes without tags of Python's is plain, and it is read as it was.
    assert yaml.safe_load(yaml.safe_dump(values)) == values
    assert LoraConfig.from_dict(values).to_dict() == values
    assert LoRA(**given).config.to_dict() == values
