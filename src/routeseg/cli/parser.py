"""The parser of every command: presets and YAML files behind --config, values and names as people write them, help in
which the options that matter come first, and one line for each mistake."""

from __future__ import annotations

import difflib
import inspect
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from routeseg.files import MAX_JSON, compose_yaml, parse_yaml, read_file

USAGE_ERROR = 2
PRESETS = Path(__file__).parents[1] / "presets"
SECTIONS = ("model", "data", "recipe", "gate_budget")  # of a configuration
FORMER = {"budget": "gate_budget"}  # names of sections in the files of earlier runs
SEED_KEY = "recipe.seed"
SIZES = ("--data.crop", "--data.image_size")  # may be given as HEIGHTxWIDTH
KINDS = {  # what values must be, by the name of their type; of several the first counts
    "tuple": "two numbers, [HEIGHT, WIDTH]",
    "list": "a list, such as [0.5, 1.0]",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
}
REMOVED = {  # keys that there were, also in the files of earlier runs, and the values that asked for nothing
    "engine": "skip",
    **{"recipe.hard_pixels": "1.0", "recipe.dice": "0.0", "recipe.teacher": "null", "recipe.teacher_weight": "1.0"},
    **{"data.num_classes": "null", "data.buffer": "1000"},
}
SYNONYMS = {  # what other tools call it
    "max_epochs": "epochs",
    "epochs": "epochs",
    "max_steps": "recipe.iterations",
    "steps": "recipe.iterations",
    "learning_rate": "recipe.lr",
    "backbone": "model.backbone",
}


class Parser(ArgumentParser):
    """jsonargparse, with the nearest valid name for a key that does not exist, and a --help for people.

    passed_over  sections that a configuration file may have, and that this command does not use
    in_python    a mistake is a ValueError, and not the end of the program
    first        what --help shows, option and value -> meaning; --help-all shows all. Empty: --help shows all
    """

    passed_over: tuple[str, ...] = ()
    in_python = False
    first: Mapping[str, str] = {}

    def __init__(self, *args: Any, **how: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **how)

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **how: Any) -> Namespace:  # type: ignore[override]
        """Keys of a section that is passed over are unknown, also if an option has the section's name (--budget). A
        size may be given as HEIGHTxWIDTH."""
        words = list(args or ())
        if self.first and "--help-all" in words:
            self.first = {}
            words = ["--help"]
        for place, word in enumerate(words):
            key, _, value = word.removeprefix("--").partition("=")
            if word.startswith("--") and "." in key and key.partition(".")[0] in self.passed_over:
                self.error(f"Unrecognized arguments: --{key}")
            if f"--{key}" in SIZES:
                at = place if value else place + 1
                words[at : at + 1] = [_size(one) for one in words[at : at + 1]]
        return super().parse_args(words, *more, **how)

    def parse_values(self, files: Sequence[str | Path], values: Mapping[str, Any]) -> Namespace:
        """The same for Python: files of --config, one on top of the other, then values by key, such as recipe.lr. A
        mistake is a ValueError."""
        self.in_python = True
        plain = {
            key: str(value) if isinstance(value, Path) else _size(value) if f"--{key}" in SIZES else value
            for key, value in values.items()
        }
        found: Namespace = self.parse_object(plain, self.parse_args([f"--config={file}" for file in files]))
        return found

    def format_help(self, formatter: Any = None) -> str:
        if not self.first:
            return super().format_help(formatter)
        wide = max(map(len, self.first))
        rows = [
            f"  {'' if name.isupper() else '--'}{name:<{wide + 2 * name.isupper()}}  {text}"
            for name, text in self.first.items()
        ]
        return "\n".join([f"usage: {self.usage}", "", *rows, "", f"All keys: {self.prog} --help-all", ""])

    def error(self, message: str, ex: Exception | None = None) -> Any:
        message = _wrong_value(message)
        options = [name for action in self._actions for name in action.option_strings]
        known = [name.removeprefix("--") for name in options if name.startswith("--") and name != "--help"]
        for wrong in _unknown_keys(message):
            if wrong.partition(".")[0] in self.passed_over:
                remedy = "give --seed instead" if wrong == SEED_KEY else "leave it out"
                message = f"`{self.prog}` does not take --{wrong}: {remedy}"
                break
            if wrong in REMOVED:
                message = f"there is no {wrong} any more: leave it out"
                break
            known += [f"{name}.{wrong.partition('.')[2]}" for name in self.passed_over]
            near = [key for key in known if key == SYNONYMS.get(wrong.rpartition(".")[2])]
            near = near or [key for key in known if key.startswith(wrong)][:1]
            near = near or difflib.get_close_matches(wrong, known, n=1, cutoff=0.5)
            near = near or [key for key in known if key.rsplit(".", 1)[-1] == wrong.rsplit(".", 1)[-1]][:1]
            option = re.search(rf"[Uu]nrecognized arguments: (--?{re.escape(wrong)})", message)
            is_option = option and wrong.partition(".")[0] not in SECTIONS
            what = f"no option {option[1]}" if option and is_option else f"no key {wrong!r} in the configuration"
            message = f"{what}: " + (f"did you mean {near[0]}?" if near else f"see `{self.prog} --help`")
            break
        if self.in_python:
            raise ValueError(_first_lines(message))
        print(f"routeseg: error: {_first_lines(message)}", file=sys.stderr)
        raise SystemExit(USAGE_ERROR)


def _size(value: Any) -> Any:
    """HEIGHTxWIDTH at the end of a text as [HEIGHT, WIDTH]; anything else as it is."""
    return re.sub(r"(\d+)x(\d+)$", r"[\1, \2]", value) if isinstance(value, str) else value


def field_texts(kind: type) -> dict[str, str]:
    """What the table in the docstring of a class, and of those it derives from, says of its fields, by name: rows of
    names, at least two spaces, and a text that goes on in lines that are indented deeper."""
    texts: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        names: list[str] = []
        for line in inspect.cleandoc(one.__doc__ or "").splitlines():
            if row := re.fullmatch(r"(\w+(?:, \w+)*)\s{2,}(\S.*)", line):
                names = row[1].split(", ")
                texts |= dict.fromkeys(names, row[2])
            elif line.startswith("    "):
                texts |= {name: f"{texts[name]} {line.strip()}" for name in names}
            else:
                names = []
    return texts


class ConfigFile(ActionConfigFile):
    """--config FILE. A file that was made for training serves the other commands, too: they pass over the sections that
    they do not use, but for the recipe's seed."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        *before, values = _presets(parser, values)
        for one in before:
            self(parser, cfg, one, option_string)
        name = values if os.path.isfile(values) else "this text"
        document: Any = None
        try:
            text = read_file(values, MAX_JSON).decode() if os.path.isfile(values) else values
            parse_yaml(text)  # for its errors; what is used are the nodes, so that every value stays as it is written
            document = compose_yaml(text)
        except (OSError, ValueError) as error:
            parser.error(f"{name} is no YAML that can be used: {getattr(error, 'strerror', None) or error}")
        if not isinstance(document, yaml.MappingNode):
            parser.error(f"--config {values} has no sections: it must be a YAML file with {', '.join(SECTIONS)}")
        else:
            kept = []
            for key, value in document.value:
                key.value = FORMER.get(key.value, key.value)
                if key.value in SECTIONS and not isinstance(value, yaml.MappingNode):
                    parser.error(f"section {key.value!r} of {values} is no mapping: give its keys, a line each")
                if key.value not in parser.passed_over:
                    kept.append((key, _without_removed(key, value)))
                elif key.value == "recipe":
                    kept = [pair for pair in value.value if pair[0].value == "seed"] + kept
            document.value = kept
            values = yaml.serialize(document)
        super().__call__(parser, cfg, values, option_string)


def _without_removed(section: yaml.Node, keys: yaml.Node) -> yaml.Node:
    """A section without the keys that there were once, if they ask for nothing."""
    if not isinstance(keys, yaml.MappingNode):
        return keys
    kept = [(key, value) for key, value in keys.value if REMOVED.get(f"{section.value}.{key.value}") != value.value]
    return keys if len(kept) == len(keys.value) else yaml.MappingNode(keys.tag, kept)


def _presets(parser: Any, name: str) -> list[str]:
    """The files of a preset; a file, and YAML itself, as it is. camvid/dynamic_a is dynamic_a on top of camvid/base."""
    if os.path.isfile(name) or "\n" in name or ":" in name:
        return [name]
    path = PRESETS / f"{name.removesuffix('.yaml')}.yaml"
    base, change = path.with_name("base.yaml"), PRESETS / path.name
    if not path.is_file() and base.is_file() and change.is_file() and path.parent.parent == PRESETS:
        return [str(base), str(change)]
    if not path.is_file():
        known = sorted(one.relative_to(PRESETS).with_suffix("").as_posix() for one in PRESETS.glob("**/*.yaml"))
        near = difflib.get_close_matches(name, known, n=1)
        parser.error(
            f"--config {name}: there is no such file, and no preset of this name: "
            + (f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}")
        )
    return [str(path)]


def _wrong_value(message: str) -> str:
    """jsonargparse's message about the value of a key, in words for people; other messages as they are."""
    if not (found := re.match(r'Parser key "([\w.]+)":\s*(.*)', message, re.DOTALL)):
        return message
    key, said = found.groups()
    value = re.search(r"Got value: (.*)|Given value: (.*)", said)
    kinds = next((text for name, text in KINDS.items() if re.search(rf"\b{name}\b", said)), None)
    if choices := re.findall(r"Literal\[(.*?)\]", said):
        kinds = "one of " + ", ".join(dict.fromkeys(", ".join(choices).replace("'", "").split(", ")))
    if kinds is None:
        return f"--{key}: {said}"
    given = "" if value is None else f" is {(value[1] or value[2] or '').strip()}"
    return f"--{key}{given}: it must be {kinds}" if given else f"--{key} must be {kinds}"


def _unknown_keys(message: str) -> list[str]:
    """The names that jsonargparse does not know, from its messages for files and for the command line."""
    pairs = re.findall(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    alone = re.findall(r"Option '([\w.]+)' is not accepted|[Uu]nrecognized arguments: --?([\w.\-]+)", message)
    return [".".join(pair) for pair in pairs] + ["".join(pair) for pair in alone]


def _first_lines(message: str) -> str:
    return " ".join(line.strip() for line in message.strip().splitlines()[:6])
