"""YAML as its version 1.2 reads it (its core schema, https://yaml.org/spec/1.2.2/#103-core-schema),
without what settings never need and a hostile file would use.

PyYAML reads YAML 1.1, where 1:30 is 90, 010 is 8, `no` is false and 2001-01-01 a date. A library for
1.2 would still follow aliases, which make a file of 400 bytes a value of gigabytes; so PyYAML's parser
is kept, and only what its values mean is said here.
"""

import re
from typing import Any, NoReturn

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

from ffcv_imnet.core.names import quoted, shown

LARGEST = 1 << 17  # characters: seconds to read; a sweep of a thousand variants has fewer
DEEPEST = 16  # plan.stages' crop_scale, the deepest setting, lies five deep in a sweep
LONGEST_KEY, LONGEST_NUMBER = 100, 40  # characters

INT, FLOAT, BOOL, NULL, TEXT = (
    f"tag:yaml.org,2002:{name}" for name in ("int", "float", "bool", "null", "str")
)
MEANING = (
    (NULL, r"~|null|Null|NULL|"),
    (BOOL, r"true|True|TRUE|false|False|FALSE"),
    (INT, r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    (FLOAT, r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"),
    (FLOAT, r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
)


class StrictError(ValueError):
    """What is wrong with a YAML text and where, in words for the user."""


def load_yaml(text: str) -> Any:
    """The value of one YAML document: None, bool, int, float, str, and lists and dicts of them.

    Keys are text, whatever they look like.

    Raises:
        StrictError: it is not YAML, has an alias, an anchor, a tag, a key twice or something that no
            setting can be, or it is too large or too deep.
    """
    if len(text) > LARGEST:
        raise StrictError(f"it has more than {LARGEST:,} characters")
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise StrictError(_line(error)) from None
    except (ValueError, OverflowError) as error:  # "\UFFFFFFFF" is no character
        raise StrictError(_line(error)) from None


def dump_yaml(value: Any, flow: bool | None = None) -> str:
    """The inverse; on one line with `flow`. Text that some reader of YAML takes for a number is quoted."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=flow, width=1000)


class _Dumper(yaml.SafeDumper):
    pass


class _Loader(yaml.SafeLoader):
    depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            self._refuse(
                event.start_mark, "anchors and aliases (& and *) are not taken: write it out"
            )
        if getattr(event, "tag", None):
            self._refuse(event.start_mark, f"tags such as {quoted(event.tag)} are not taken")
        self.depth += 1
        if self.depth > DEEPEST:
            self._refuse(event.start_mark, f"nested more than {DEEPEST} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_scalar_node(self, anchor: Any) -> ScalarNode:
        node = super().compose_scalar_node(anchor)
        # NUL ends a path early, and half of a surrogate pair cannot be stored.
        if bad := re.search("[\0\ud800-\udfff]", node.value):
            self._refuse(node.start_mark, f"the character U+{ord(bad.group()):04X} is not taken")
        return node

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for key, value in node.value:
            if not isinstance(key, ScalarNode):
                self._refuse(key.start_mark, "a key must be text")
            if len(key.value) > LONGEST_KEY:
                self._refuse(key.start_mark, f"a key has more than {LONGEST_KEY} characters")
            if key.value in found:
                self._refuse(key.start_mark, f"the key {quoted(key.value)} stands twice")
            found[key.value] = self.construct_object(value, deep=True)
        return found

    def _refuse(self, mark: yaml.Mark, what: str) -> NoReturn:
        raise StrictError(f"line {mark.line + 1}: {what}")

    def _number(self, node: ScalarNode) -> int | float:
        text = node.value
        if len(text) > LONGEST_NUMBER:
            self._refuse(node.start_mark, f"a number has more than {LONGEST_NUMBER} characters")
        if re.fullmatch(r"[-+]?0[0-9]+", text):
            what = f"the number {text} begins with 0: readers differ on what it is, leave the 0 out"
            self._refuse(node.start_mark, what)
        if node.tag == INT:
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        word = text.lower()
        return float(word.replace(".", "") if word.endswith(("inf", "nan")) else word)


def _line(error: Exception) -> str:
    """The line, and PyYAML's reason alone of its several lines."""
    mark, reason = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    place = f"line {mark.line + 1}: " if mark is not None else ""
    return shown(place + " ".join(str(reason or error).split())[:240])


_Loader.yaml_implicit_resolvers = {}
_Loader.add_constructor(INT, _Loader._number)
_Loader.add_constructor(FLOAT, _Loader._number)
for _tag, _pattern in MEANING:
    for _kind in (_Loader, _Dumper):  # the dumper knows those of YAML 1.1 as well
        _kind.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), None)
