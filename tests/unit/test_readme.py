"""The documents agree with the code: settings, commands, targets, examples, log events and links."""

import base64
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from pydantic.fields import FieldInfo
from typer.main import get_command

from keepstream import names
from keepstream.events import parse_event
from keepstream.jobs import parse_job
from keepstream_gateway.settings import OWN_FIELDS
from keepstream_gateway.settings import Settings as GatewaySettings
from keepstream_worker.commands.dev_directory import API_KEY, API_URL
from keepstream_worker.commands.main import app
from keepstream_worker.providers.config import parse_policy, parse_providers
from keepstream_worker.settings import Settings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "docs" / "operations" / "running.md").read_text()
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
TARGETS = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))


def blocks(language: str, document: str = README) -> list[str]:
    """The code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", document, re.MULTILINE | re.DOTALL)


def commands(program: str) -> Iterator[list[str]]:
    """The arguments of each call of a program, in code blocks and in running text, of all documents."""
    for document in DOCUMENTS:
        text = document.read_text()
        shell = "".join(blocks("sh", text)) + "\n".join(re.findall(r"`([^`\n]+)`", text))
        for line in re.findall(rf"^{program} (.+)$", shell.replace("\\\n", " "), re.MULTILINE):
            yield shlex.split(line, comments=True)


# -- settings --


def settings_table(prefix: str, fields: Mapping[str, FieldInfo]) -> str:
    """A table of settings of the README."""
    rows = ["| Variable | Default | Meaning |", "|---|---|---|"]
    for name, field in fields.items():
        default = "" if field.default in (None, "") else f"`{_plain(field.default)}`"
        rows.append(f"| `{prefix}{name.upper()}` | {default} | {field.description} |")
    return "\n".join(rows) + "\n"


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


@pytest.mark.parametrize(
    ("marker", "prefix", "fields"),
    [
        ("settings", names.ENVIRONMENT, Settings.model_fields),
        ("gateway settings", names.GATEWAY_ENVIRONMENT, OWN_FIELDS),
    ],
)
def test_the_table_of_settings_is_that_of_the_code(marker: str, prefix: str, fields: Mapping[str, FieldInfo]) -> None:
    """When it fails: put what is expected between the markers."""
    match = re.search(rf"<!-- {marker} -->\n(.*)<!-- /{marker} -->", README, re.DOTALL)
    assert match is not None
    assert match[1] == settings_table(prefix, fields)


def test_what_gateway_and_worker_share_has_one_default() -> None:
    shared = {name: field for name, field in GatewaySettings.model_fields.items() if name not in OWN_FIELDS}
    assert shared
    for name, field in shared.items():
        assert field.validation_alias == f"KEEPSTREAM_{name.upper()}"
        assert field.default == Settings.model_fields[name].default


def test_every_variable_that_a_document_names_exists() -> None:
    known = {f"KEEPSTREAM_{name.upper()}" for name in Settings.model_fields} | {"KEEPSTREAM_DEV"}
    known |= {f"KEEPSTREAM_GATEWAY_{name.upper()}" for name in OWN_FIELDS} | {API_KEY, API_URL}
    named = {name for document in DOCUMENTS for name in re.findall(r"KEEPSTREAM_[A-Z_]+[A-Z]", document.read_text())}
    assert named - known == set()


# -- commands --


def test_every_make_target_that_a_document_names_exists() -> None:
    named = {arguments[0] for arguments in commands("make")}
    assert {"demo", "test"} <= named <= TARGETS


def test_every_keepstream_command_and_option_that_a_document_names_exists() -> None:
    for command, *arguments in commands("keepstream"):
        assert command in COMMANDS, command
        known = COMMANDS[command]
        while arguments and arguments[0] in getattr(known, "commands", {}):
            known = known.commands[arguments.pop(0)]
        options = {option for parameter in known.params for option in parameter.opts}
        used = {argument.partition("=")[0] for argument in arguments if re.match(r"--?[a-z]", argument)}
        assert used <= options | {"--help"}, (command, used - options)


def test_the_readme_lists_every_command() -> None:
    assert re.findall(r"^\| `keepstream (\w+)` \|", README, re.MULTILINE) == list(COMMANDS)


def test_the_exit_codes_are_those_of_the_command_line() -> None:
    from keepstream_worker.commands import exits

    codes = (exits.OK, exits.UNSUCCESSFUL, exits.INVALID, exits.UNAVAILABLE, exits.NOT_FOUND, exits.INTERRUPTED)
    match = re.search(r"Exit codes: ([^.]*)\.", README)
    assert match is not None
    assert [int(number) for number in re.findall(r"\d+", match[1])] == list(codes)


# -- examples --


def test_python_examples_compile() -> None:
    examples = blocks("python")
    assert examples
    for number, example in enumerate(examples):
        compile(example, f"README.md, example {number}", "exec", dont_inherit=True)


def test_the_example_of_a_message_is_valid_and_holds_a_valid_job() -> None:
    message = json.loads(blocks("json")[0])
    document = json.loads((ROOT / "api_contracts" / "keepstream" / "schemas" / "asyncapi.json").read_text())
    jsonschema.Draft202012Validator(document["components"]["schemas"]["JobMessage"]).validate(message)
    (job,), _, _ = json.loads(base64.b64decode(message["body"]))
    assert parse_job(job).id == message["headers"]["id"]
    assert message["headers"]["task"] == names.TASK


def test_the_example_of_an_event_is_one() -> None:
    assert parse_event(blocks("json")[1]).type == "delta"


def test_the_example_of_a_providers_file_is_accepted() -> None:
    text, limits = blocks("toml")
    environment = {"GROQ_API_KEY": "k", "AZURE_OPENAI_API_KEY": "k", "GATEWAY_KEY": "k"}
    providers = {"default", "groq", "mistral", "azure-eu", "azure-entra", "local", "gateway"}
    assert set(parse_providers(text, environment)) == providers
    policy = parse_policy(limits, {})
    assert [key for key, _ in policy.limits_of("openai", "gpt-6-mini")] == ["openai", "openai/gpt-6-mini"]
    assert policy.doubts() == []


def test_channel_and_log_are_named_as_they_are() -> None:
    keys = names.job_keys(names.DEFAULT_TENANT, "by-hand-2")
    assert f"SUBSCRIBE '{keys.channel}'" in README
    assert f"XRANGE '{keys.log}'" in README


# -- the guide --


def test_every_log_event_is_explained() -> None:
    files = [path for package in ("worker", "gateway") for path in sorted((ROOT / package).rglob("*.py"))]
    source = "\n".join(path.read_text() for path in files)
    said = set(re.findall(r"\blog\.(?:info|warning|error|exception|critical)\(\s*\"(\w+)\"", source))
    explained = set(re.findall(r"^\| `(\w+)` \| (?:info|warning|error|critical) \|", GUIDE, re.MULTILINE))
    assert said == explained


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), link
        if anchor:
            assert anchor in {_anchor(title) for title in re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_a_document_names_exists(document: Path) -> None:
    named = re.findall(
        r"`((?:api_contracts|worker|gateway|tests|docs|migrations|requirements|benchmarks)/[\w./-]+)`",
        document.read_text(),
    )
    assert [path for path in named if not (ROOT / path).exists()] == []


def _anchor(title: str) -> str:
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def test_decisions_are_numbered_without_gaps() -> None:
    numbers = [int(path.name[:4]) for path in sorted((ROOT / "docs" / "decisions").glob("*.md"))]
    assert numbers == list(range(1, len(numbers) + 1))
